# The same as hot_plug_of_an_nvme, of a function by iommufd: the machine starts without one, and nothing is pinned when it is gone.
# kernel: own
# needs: CONFIG_IOMMUFD
# limit: 600
# long
. /causeway/files/lib.sh
. /causeway/files/plug-lib.sh

nvme_comes_and_goes iommufd
