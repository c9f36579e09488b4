# limit: 600
# All test images with an assigned edu: guest tables, notifications, the bridge and the real IOMMU; interrupts by way of the host's kernel
# and KVM's routes. The same images pass with the emulated edu (`images::`). L1's kernel logs the faults that they provoke.
. /causeway/files/lib.sh

bind-vfio "$EDU" || fail "binding"
causeway test --device vfio,host="$EDU" --timeout 120 >images.log 2>&1
status=$?
cat images.log
expect "status of the images" "$status" 0
# L1's IOMMU has 48 bits, an assigned function needs Caching Mode and pins all of its guest's memory, and L1 has less than 5 GiB.
expect "what was skipped" "$(sed -n 's/^test \(.*\) \.\.\. skipped: .*/\1/p' images.log | sort | xargs)" \
    "a1_five_levels a4_57_bits a4_caching_mode_is_an_option b3_whole_space_unmap_57_bits \
machine_memory_goes_on_above_4_gib"
expect "how many passed" "$(sed -n 's/ passed, 0 failed, 5 skipped$//p' images.log)" $(($(causeway test --list | wc -l) - 5))
