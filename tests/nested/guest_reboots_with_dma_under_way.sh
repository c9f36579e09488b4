# topology: ports
# limit: 480
# The guest resets itself while its NVMe, edu and e1000e are under DMA: after each reset all of them work, and nothing faults.
. /causeway/files/lib.sh
. /causeway/files/life-lib.sh
reboots 3
