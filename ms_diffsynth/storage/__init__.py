"""What a run keeps on disk: the commit protocol, the lock of a folder, checkpoints, the cache. Knows no MindSpore."""
