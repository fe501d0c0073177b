"""The builder of a run: from settings to pipeline, data sets, module, sampler and trainer."""
