# long
# topology: ports
# limit: 1560
# As guest_reboots_with_dma_under_way, for a long life.
. /causeway/files/lib.sh
. /causeway/files/life-lib.sh
reboots 20
