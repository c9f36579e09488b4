# long
# limit: 2400
# As host_calls_that_fail_are_survived, at calls all over a boot and a read, in each way in which the kernel can fail them.
. /causeway/files/lib.sh
. /causeway/files/fail-lib.sh

failing_guest 16
without_failure
number=0
next() {
    number=$((number + 1))
    one $number "$@"
}
for call in set-container:16 set-iommu:1 iommu-info:22 get-device:16 device-info:22; do
    next --call "${call%:*}" --nth 1 --way "refused=${call#*:}"
    judge "${call%:*} 1: errno ${call#*:}" refused
done
# A map of all RAM that is refused is told as any other.
for call in map-dma:12 map-dma:28; do
    next --call "${call%:*}" --nth 1 --way "refused=${call#*:}"
    judge "${call%:*} 1: errno ${call#*:}"
done
# EINVAL: it would cut a mapping. ENOMEM, EINTR: nothing was done. Then what is done and said to have failed, and what is miscounted.
for failure in refused=22 less=4096 done=4 more=4096 refused=12; do
    for place in 25 90; do
        next --call unmap-dma --nth "$(at $place "$UNMAPS")" --way $failure
        judge "unmap $place%: $failure"
    done
done
# No entry left, no locked memory left, outside of the ranges, no memory behind the address, something there, a signal.
for failure in ENOSPC:28 ENOMEM:12 EINVAL:22 EFAULT:14 EEXIST:17 EINTR:4; do
    for places in 10 35,50 65,80,90; do
        next --call map-dma --nth "$(at $places "$MAPS")" --way "refused=${failure#*:}"
        judge "maps $places%: ${failure%:*}"
    done
done
for call in region-info:22 reset:16 set-irqs:22 set-irqs:28; do
    next --call "${call%:*}" --nth 2 --way "refused=${call#*:}"
    judge "${call%:*} 2: errno ${call#*:}"
done
echo "$RESULTS failures in $number runs:$(echo "$VERDICTS" | tr ' ' '\n' | grep . | sort | uniq -c | tr '\n' ',' | tr -s ' ')"
[ $RESULTS -ge 40 ] || fail "only $RESULTS"
