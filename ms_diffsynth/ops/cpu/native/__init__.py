"""Kernels of our own for the CPU: C++ in this folder, built where they run (`build`), called by MindSpore (`kernels`).

What no operator of MindSpore does in one pass, behind the names of `ops.network` (`network`) and of `mindspore.mint`
(`ops.cpu`). `build.library` says whether this process has them; without it the compositions of `ops.cpu` serve.
"""
