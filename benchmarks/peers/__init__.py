"""disttrain's loader against the loaders of webdataset, Streaming, litdata, torchdata and grain; see ``__main__``."""
