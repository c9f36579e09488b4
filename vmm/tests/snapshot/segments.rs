//! a machine with functions in two PCI segments.

use super::*;

#[test]
fn a13_a_machine_with_two_segments_is_saved_and_goes_on_with_both() {
    if !has_kvm() {
        return;
    }
    let bench = Bench::new();
    // The same address in both, and a BAR that has a window above 4 GiB in its own segment.
    let units = ["--iommu", "vtd", "--iommu", "vtd,segment=2"];
    let devices = ["--device", "edu", "--device", "edu,addr=0002:00:01.0", "--device", "virtio-rng,addr=0002:00:02.0"];
    let mut source = bench.start(ROUNDS, &[&units[..], &devices].concat());
    let snapshot = bench.path("snapshot");
    source.done(&["snapshot", text(&snapshot)]);
    assert_eq!(result(&source.end()), wanted(ROUNDS));
    let mut restored = bench.restore(&snapshot);
    let there = restored.done(&["devices"]).to_string();
    assert!(["\"00:01.0\"", "\"0002:00:01.0\"", "\"0002:00:02.0\""].iter().all(|addr| there.contains(addr)), "{there}");
    assert_eq!(result(&restored.end()), wanted(ROUNDS));
    // A machine of before has one segment: its description says nothing of others.
    let described = |bench: &Bench, options: &[&str], name: &str| {
        let (mut machine, folder) = (bench.start(ROUNDS, options), bench.path(name));
        machine.done(&["snapshot", text(&folder)]);
        machine.done(&["quit"]);
        machine.end();
        let files = fs::read_dir(&folder).unwrap().map(|file| file.unwrap().path());
        files.filter_map(|file| fs::read_to_string(file).ok()).any(|text| text.contains("further_pci64"))
    };
    assert!(!described(&bench, &["--device", "edu"], "one"));
    assert!(described(&bench, &[&units[..], &devices].concat(), "two"));
}
