# limit: 360
# The guest gives its NVMe to its own vfio, maps huge pages for it, and takes it back, while its edu and e1000e work on the other vCPU.
. /causeway/files/lib.sh
. /causeway/files/life-lib.sh
rebinds 3
