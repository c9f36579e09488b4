# long
# limit: 1200
# As nvme_goes_to_the_guests_vfio_and_back, for a long life.
. /causeway/files/lib.sh
. /causeway/files/life-lib.sh
rebinds 20
