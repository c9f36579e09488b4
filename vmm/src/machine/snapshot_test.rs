//! Folders that are snapshots, and those that are none.

use proptest::prelude::*;
use vm_memory::GuestAddress;
use vmm_sys_util::tempdir::TempDir;

use super::*;

const SIZE: usize = 16 * PAGE;

fn ram() -> Ram {
    Ram::from_ranges(&[(GuestAddress(0), SIZE), (GuestAddress(1 << 32), SIZE)]).unwrap()
}

/// RAM with something in it: at its beginning, at both ends of a page, and at its end.
fn used() -> Ram {
    let ram = ram();
    for (at, byte) in [(0, 1u8), (3 * PAGE as u64, 2), (4 * PAGE as u64 - 1, 3), ((1 << 32) + SIZE as u64 - 1, 4)] {
        ram.write_obj(byte, GuestAddress(at)).unwrap();
    }
    ram
}

fn content(ram: &Ram) -> Vec<u8> {
    let mut bytes = vec![0; 2 * SIZE];
    ram.read_slice(&mut bytes[..SIZE], GuestAddress(0)).unwrap();
    ram.read_slice(&mut bytes[SIZE..], GuestAddress(1 << 32)).unwrap();
    bytes
}

/// A snapshot of a machine of nothing, with `ram`.
fn save(wanted: &Path, ram: &Ram) {
    let machine = Description {
        options: vec!["--cpus=1".to_owned()],
        physical_bits: 46,
        pci64: None,
        further_pci64: Vec::new(),
        models: Vec::new(),
    };
    let folder = Folder::beside(wanted).unwrap();
    let (manifest, stored) = folder.fill(&Whole { machine, state: MachineState::of_nothing() }, ram).unwrap();
    assert_eq!(stored, 3 * PAGE as u64, "what is zero is not stored");
    folder.write(MANIFEST, &bytes_of(&manifest)).unwrap();
    folder.name(wanted).unwrap();
}

/// Opens it and reads its memory.
fn load(path: &Path) -> Result<Vec<u8>, Error> {
    let (snapshot, ram) = (Snapshot::open(path)?, ram());
    snapshot.read_memory(&ram).map(|_| content(&ram))
}

#[test]
fn a14_memory_comes_back_byte_by_byte_and_holes_stay_holes() {
    let dir = TempDir::new().unwrap();
    let path = dir.as_path().join("saved");
    let ram = used();
    save(&path, &ram);
    assert_eq!(load(&path).unwrap(), content(&ram));
    let names: Vec<_> = fs::read_dir(dir.as_path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, ["saved"], "nothing else is left");
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    let memory = fs::metadata(path.join(MEMORY)).unwrap();
    assert_eq!(memory.len(), 2 * SIZE as u64);
    assert!(memory.blocks() * 512 < memory.len(), "{} blocks", memory.blocks());
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o077, 0);
}

#[test]
fn a14_a_folder_that_does_not_get_its_name_goes() {
    let dir = TempDir::new().unwrap();
    let path = dir.as_path().join("saved");
    drop(Folder::beside(&path).unwrap());
    assert_eq!(fs::read_dir(dir.as_path()).unwrap().count(), 0);
    let folder = Folder::beside(&path).unwrap();
    fs::create_dir(&path).unwrap();
    fs::write(path.join("file"), "of another").unwrap();
    assert!(matches!(folder.name(&path), Err(Error::There(there)) if there == path));
    assert_eq!(fs::read_to_string(path.join("file")).unwrap(), "of another");
    assert_eq!(fs::read_dir(dir.as_path()).unwrap().count(), 1);
    assert!(matches!(Folder::beside(Path::new("/")), Err(Error::NoName(_))));
}

#[test]
fn a14_what_is_no_snapshot_of_this_version_is_refused_with_the_reason() {
    let dir = TempDir::new().unwrap();
    let path = dir.as_path().join("saved");
    assert!(matches!(Snapshot::open(&path), Err(Error::Io { .. })));
    save(&path, &used());
    let text = fs::read_to_string(path.join(MANIFEST)).unwrap();
    let with = |from: &str, to: &str| {
        assert!(text.contains(from), "{from}");
        fs::write(path.join(MANIFEST), text.replacen(from, to, 1)).unwrap();
        load(&path).unwrap_err().to_string()
    };
    assert!(with("\"version\": 1", "\"version\": 2").contains("has version 2 of the form"), "a newer one");
    assert!(with("causeway snapshot", "another program").contains("its form is `another program`"));
    assert!(with("\"state\"", "\"more\": 0, \"state\"").contains("not understood"));
    fs::write(path.join(MANIFEST), "{}").unwrap();
    assert!(load(&path).unwrap_err().to_string().contains("is not a snapshot of causeway"));
    fs::write(path.join(MANIFEST), vec![b' '; MOST_MANIFEST as usize + 1]).unwrap();
    assert!(load(&path).unwrap_err().to_string().contains("more than there can be"));
}

#[test]
fn a14_no_byte_of_a_manifest_can_be_another() {
    let dir = TempDir::new().unwrap();
    let path = dir.as_path().join("saved");
    save(&path, &used());
    let bytes = fs::read(path.join(MANIFEST)).unwrap();
    for at in 0..bytes.len() {
        for byte in [bytes[at] ^ 1, b' ', b'0', 0xff] {
            let mut broken = bytes.clone();
            broken[at] = byte;
            if broken != bytes {
                fs::write(path.join(MANIFEST), &broken).unwrap();
                assert!(load(&path).is_err(), "byte {at} is {byte:#x}");
            }
        }
        fs::write(path.join(MANIFEST), &bytes[..at]).unwrap();
        assert!(load(&path).is_err(), "{at} bytes");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// Whatever is done to state or memory, it is noticed.
    #[test]
    fn a14_no_byte_of_state_or_memory_can_be_another(
        name in prop_oneof![Just(STATE), Just(MEMORY)],
        at in any::<prop::sample::Index>(),
        bits in 1u8..,
        cut in any::<bool>(),
    ) {
        let dir = TempDir::new().unwrap();
        let path = dir.as_path().join("saved");
        save(&path, &used());
        let file = path.join(name);
        let mut bytes = fs::read(&file).unwrap();
        let at = at.index(bytes.len());
        if cut { bytes.truncate(at) } else { bytes[at] ^= bits }
        fs::write(&file, &bytes).unwrap();
        prop_assert!(load(&path).is_err());
    }
}

#[test]
fn a14_memory_of_another_size_than_the_machines_is_refused() {
    let dir = TempDir::new().unwrap();
    let path = dir.as_path().join("saved");
    save(&path, &used());
    let smaller = Ram::from_ranges(&[(GuestAddress(0), SIZE)]).unwrap();
    let error = Snapshot::open(&path).unwrap().read_memory(&smaller).err().unwrap();
    assert!(error.to_string().contains("and the machine has"), "{error}");
}
