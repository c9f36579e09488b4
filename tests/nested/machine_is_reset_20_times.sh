# topology: ports
# long
# limit: 1560
# As guest_reboots_20_times, but each reset comes from outside, by the control socket, under DMA of all three functions; an audit before each has
# no difference.
. /causeway/files/lib.sh
. /causeway/files/life-lib.sh
reboots 20 from-outside
