//! What CPUID says to each vCPU: what KVM supports, with our topology of one package, one thread a core.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};

const TSC_DEADLINE: u32 = 1 << 24;
const X2APIC: u32 = 1 << 21;
const HYPERVISOR: u32 = 1 << 31;
const MULTI_THREADING: u32 = 1 << 28;
/// KVM's own leaves begin here, and say the last of them in EAX.
const KVM_SIGNATURE: u32 = 0x4000_0000;
/// "KVMKVMKVM" in EBX.
const KVM_SIGNATURE_EBX: u32 = u32::from_le_bytes(*b"KVMK");
/// The rates of the time-stamp counter (EAX) and of the local APIC's timer (EBX) in kHz, as VMware began to tell them;
/// Linux, the BSDs and Darwin read it, and need not measure.
const FREQUENCIES: u32 = KVM_SIGNATURE + 0x10;
/// KVM's local APIC timer counts nanoseconds.
const APIC_TIMER_KHZ: u32 = 1_000_000;
/// Used when CPUID does not say: what the first 64-bit processors had.
const DEFAULT_PHYSICAL_BITS: u8 = 36;

/// What KVM supports on this host.
pub fn supported(kvm: &Kvm) -> Result<CpuId, kvm_ioctls::Error> {
    let mut cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
    if kvm.check_extension(Cap::TscDeadlineTimer) {
        for entry in cpuid.as_mut_slice().iter_mut().filter(|entry| entry.function == 1) {
            entry.ecx |= TSC_DEADLINE;
        }
    }
    Ok(cpuid)
}

/// The guest's physical address width in bits.
pub fn physical_bits(cpuid: &CpuId) -> u8 {
    let entry = cpuid.as_slice().iter().find(|entry| entry.function == 0x8000_0008);
    match entry.map(|entry| entry.eax & 0xff) {
        Some(bits @ 32..=52) => bits as u8,
        _ => DEFAULT_PHYSICAL_BITS,
    }
}

/// The bits of an APIC id that number the cores of a package of `cpus`.
fn core_bits(cpus: u32) -> u32 {
    cpus.next_power_of_two().trailing_zeros()
}

/// What vCPU `index` of `cpus` (at most 254) sees, whose time-stamp counter has that rate, if it is known.
pub fn for_vcpu(supported: &CpuId, index: u8, cpus: u8, tsc_khz: Option<u32>) -> CpuId {
    let (id, cpus) = (u32::from(index), u32::from(cpus));
    let mut entries: Vec<kvm_cpuid_entry2> = supported
        .as_slice()
        .iter()
        .filter(|entry| !matches!(entry.function, 0xb | 0x1f | 0x8000_0026))
        .copied()
        .collect();
    for entry in &mut entries {
        match entry.function {
            1 => {
                entry.ebx = (entry.ebx & 0xffff) | id << 24 | cpus << 16;
                entry.ecx |= X2APIC | HYPERVISOR;
                entry.edx = if cpus > 1 { entry.edx | MULTI_THREADING } else { entry.edx & !MULTI_THREADING };
            }
            // Caches: each core its own, except the last level, which the package shares.
            4 | 0x8000_001d => {
                let level = entry.eax >> 5 & 7;
                let sharing = if level == 3 { cpus.next_power_of_two() - 1 } else { 0 };
                entry.eax = (entry.eax & 0x3fff) | sharing << 14;
                if entry.function == 4 {
                    entry.eax |= (cpus.next_power_of_two() - 1).min(0x3f) << 26;
                }
            }
            0x8000_0008 => entry.ecx = (entry.ecx & !0xf0ff) | core_bits(cpus) << 12 | (cpus - 1),
            0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (id, id, 0),
            _ => {}
        }
    }
    if entries.iter().any(|entry| entry.function == 0 && entry.eax >= 0xb) {
        let level = |index, eax, ebx, kind: u32| kvm_cpuid_entry2 {
            function: 0xb,
            index,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax,
            ebx,
            ecx: index | kind << 8,
            edx: id,
            ..Default::default()
        };
        // Threads of a core, cores of the package, the end.
        entries.extend([level(0, 0, 1, 1), level(1, core_bits(cpus), cpus, 2), level(2, 0, 0, 0)]);
    }
    let is_kvm = |entry: &&mut kvm_cpuid_entry2| entry.function == KVM_SIGNATURE && entry.ebx == KVM_SIGNATURE_EBX;
    if let (Some(tsc_khz), Some(signature)) = (tsc_khz, entries.iter_mut().find(is_kvm)) {
        signature.eax = signature.eax.max(FREQUENCIES);
        entries.retain(|entry| entry.function != FREQUENCIES);
        let (eax, ebx) = (tsc_khz, APIC_TIMER_KHZ);
        entries.push(kvm_cpuid_entry2 { function: FREQUENCIES, eax, ebx, ..Default::default() });
    }
    // KVM_GET_SUPPORTED_CPUID never fills more than the limit, and three entries replace at least the three of leaf
    // 0xb.
    CpuId::from_entries(&entries).unwrap_or_else(|_| supported.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, eax: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, eax, ..Default::default() }
    }

    #[test]
    fn each_vcpu_has_its_own_apic_id_everywhere() {
        let supported = CpuId::from_entries(&[
            entry(0, 0xd),
            entry(1, 0),
            entry(0xb, 7),
            entry(0x1f, 7),
            entry(0x8000_0008, 40),
            entry(0x8000_001e, 0),
        ])
        .unwrap();
        for index in 0..3 {
            let cpuid = for_vcpu(&supported, index, 3, None);
            let find =
                |function, sub| *cpuid.as_slice().iter().find(|e| e.function == function && e.index == sub).unwrap();
            let id = u32::from(index);
            assert_eq!((find(1, 0).ebx >> 24, find(1, 0).ebx >> 16 & 0xff), (id, 3));
            assert_eq!(find(1, 0).ecx & (X2APIC | HYPERVISOR), X2APIC | HYPERVISOR);
            assert_eq!((find(0xb, 0).ebx, find(0xb, 0).edx), (1, id));
            assert_eq!((find(0xb, 1).eax, find(0xb, 1).ebx, find(0xb, 1).edx), (2, 3, id));
            assert_eq!(find(0xb, 2).ecx, 2);
            assert_eq!((find(0x8000_0008, 0).ecx & 0xff, find(0x8000_0008, 0).ecx >> 12 & 0xf), (2, 2));
            assert_eq!(find(0x8000_001e, 0).eax, id);
            assert!(!cpuid.as_slice().iter().any(|e| e.function == 0x1f));
        }
    }

    #[test]
    fn rates_are_told_where_kvm_is_told_of() {
        let signature = kvm_cpuid_entry2 { ebx: KVM_SIGNATURE_EBX, ..entry(KVM_SIGNATURE, 0x4000_0001) };
        let rates = |entries: &[kvm_cpuid_entry2], tsc_khz| {
            let cpuid = for_vcpu(&CpuId::from_entries(entries).unwrap(), 0, 1, tsc_khz);
            let find = |function| cpuid.as_slice().iter().find(|entry| entry.function == function).copied();
            (find(KVM_SIGNATURE).map(|entry| entry.eax), find(FREQUENCIES).map(|entry| (entry.eax, entry.ebx)))
        };
        let told = (Some(FREQUENCIES), Some((2_400_000, 1_000_000)));
        assert_eq!(rates(&[entry(0, 0xd), signature], Some(2_400_000)), told);
        assert_eq!(rates(&[signature, entry(FREQUENCIES, 7)], Some(2_400_000)), told);
        assert_eq!(rates(&[signature], None), (Some(0x4000_0001), None));
        assert_eq!(rates(&[entry(KVM_SIGNATURE, 5)], Some(2_400_000)), (Some(5), None), "another hypervisor's leaves");
    }

    #[test]
    fn physical_width_comes_from_its_leaf_or_is_the_least() {
        assert_eq!(physical_bits(&CpuId::from_entries(&[entry(0x8000_0008, 0x3028)]).unwrap()), 40);
        assert_eq!(physical_bits(&CpuId::from_entries(&[entry(0x8000_0008, 0)]).unwrap()), 36);
        assert_eq!(physical_bits(&CpuId::from_entries(&[]).unwrap()), 36);
    }
}
