# limit: 600
# All test images with an assigned edu: guest tables, notifications, the bridge and the real IOMMU; interrupts by way of the host's kernel
# and KVM's routes. The same images pass with the emulated edu (`images::`). L1's kernel logs the faults that they provoke.
. /causeway/files/lib.sh

bind-vfio "$EDU" || fail "binding"
causeway test --device vfio,host="$EDU" --timeout 120 >images.log 2>&1
status=$?
cat images.log
expect "status of the images" "$status" 0
# L1's IOMMU has 48 bits, an assigned function needs Caching Mode, reaches no first stage, sets no flags in the guest's tables and pins all of
# its guest's memory, and L1 has less than 5 GiB; the host hears of its faults, which tests of several units ask the units for.
SKIPPED="a12_device_tlb_of_a_pasid a12_page_request_is_answered_and_the_data_arrives a13_a_unit_may_remap_interrupts_only \
a13_each_unit_translates_for_its_own_functions \
a13_faults_are_recorded_by_the_unit_of_the_function a13_interrupts_are_remapped_by_the_unit_of_the_function a13_invalidations_reach_one_unit \
a15_an_overflow_interrupts_and_freezes a15_counters_move_by_what_a_device_asks_for a15_frozen_counters_stand_still \
a15_what_cannot_be_counted_is_refused a1_five_levels a2_first_stage_says_what_was_used a2_nested_translation_has_flags_in_both_stages \
a2_nested_translation_leads_through_both_stages a2_two_pasids_reach_different_memory a3_nested_translation_has_reasons_of_its_own a4_57_bits \
a4_caching_mode_is_an_option a4_nested_translation_is_off_unless_asked_for a6_invalidations_of_either_stage_take_effect \
b3_whole_space_unmap_57_bits e1_second_stage_says_what_was_written e1_tracking_goes_on_while_a_device_works machine_memory_goes_on_above_4_gib"
expect "what was skipped" "$(sed -n 's/^test \(.*\) \.\.\. skipped: .*/\1/p' images.log | sort | xargs)" "$SKIPPED"
skipped=$(($(echo "$SKIPPED" | wc -w)))
expect "how many passed" "$(sed -n "s/ passed, 0 failed, $skipped skipped\$//p" images.log)" $(($(causeway test --list | wc -l) - skipped))
