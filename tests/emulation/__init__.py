"""CUDA kernels without a GPU: the sources are compiled for the host and run by fibers. See README.md here."""
