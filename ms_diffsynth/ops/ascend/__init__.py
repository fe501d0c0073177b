"""Operations by the fused kernels that CANN has and MindSpore gives a name."""
