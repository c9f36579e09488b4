# While a guest reads its NVMe, a call of Causeway to the host's kernel fails, from outside: a map, an unmap that is refused, one that says to have taken away less
# than it did, and a call of the start. The guest goes on and reads right, or its function is stopped and it is told, or the start is refused; nothing
# stays pinned (B-11). With --long: host_calls_that_fail_are_survived_50_times.
. /causeway/files/lib.sh
. /causeway/files/fail-lib.sh

failing_guest 8
without_failure
one 1 --call map-dma --nth "$(at 30,50,70 "$MAPS")" --way refused=12
judge "maps 30,50,70%: ENOMEM"
one 2 --call unmap-dma --nth "$(at 50 "$UNMAPS")" --way refused=22
judge "unmap 50%: EINVAL" stopped
one 3 --call unmap-dma --nth "$(at 30 "$UNMAPS")" --way less=4096
judge "unmap 30%: 4096 bytes less" stopped
one 4 --call set-iommu --nth 1 --way refused=1
judge "set-iommu: EPERM" refused
