"""Model hubs: where the files of a model are, downloads, uploads and the model card. Knows no MindSpore."""
