# topology: ports
# limit: 360
# The guest starts another kernel by itself: by kexec, and by a panic (kdump), where it finds translation and interrupt remapping on and
# copies the tables. Each time DMA of the first kernel is under way, and the second one reads the disk right.
. /causeway/files/lib.sh
. /causeway/files/life-lib.sh
second_kernels 2
