//! `fw_cfg`, the way in which bare-metal images for PCs ask their machine about itself: a selector port and a data
//! port, without the DMA interface. Numbers are little-endian, those of the file directory big-endian.

use std::collections::BTreeMap;
use std::sync::Mutex;

use serde_json::Value;

use crate::BusDevice;
use crate::saved::{Saves, Unfit, decode, encode, fits};

/// Selects the signature `QEMU`, by which images find the device.
pub const SIGNATURE: u16 = 0x00;
/// Selects the features: bit 0 is this interface, bit 1 DMA.
pub const FEATURES: u16 = 0x01;
/// Selects the bytes of RAM (64 bits).
pub const RAM_SIZE: u16 = 0x03;
/// Selects the number of processors (16 bits).
pub const CPUS: u16 = 0x05;
/// Selects the greatest number of processors (16 bits).
pub const MAX_CPUS: u16 = 0x0f;
/// Selects the directory of the files.
pub const FILE_DIRECTORY: u16 = 0x19;
/// Selects the first file.
pub const FIRST_FILE: u16 = 0x20;

const NAME_SIZE: usize = 56;

/// The device.
pub struct FwCfg {
    items: BTreeMap<u16, Vec<u8>>,
    /// What is selected, and how much of it was read.
    cursor: Mutex<(u16, usize)>,
}

impl FwCfg {
    /// The first port: the selector (16 bits).
    pub const FIRST: u64 = 0x510;
    /// The last port: the data (8 bits).
    pub const LAST: u64 = 0x511;

    /// What a machine with `ram` bytes of RAM and `cpus` processors says of itself, and `files` (name, content).
    ///
    /// # Panics
    /// When a name has more than 55 bytes: a mistake of the machine's author.
    pub fn new(ram: u64, cpus: u16, files: &[(&str, Vec<u8>)]) -> Self {
        let mut directory = (files.len() as u32).to_be_bytes().to_vec();
        let mut items = BTreeMap::from([
            (SIGNATURE, b"QEMU".to_vec()),
            (FEATURES, 1u32.to_le_bytes().to_vec()),
            (RAM_SIZE, ram.to_le_bytes().to_vec()),
            (CPUS, cpus.to_le_bytes().to_vec()),
            (MAX_CPUS, cpus.to_le_bytes().to_vec()),
        ]);
        for ((name, content), selector) in files.iter().zip(FIRST_FILE..) {
            assert!(name.len() < NAME_SIZE);
            directory.extend_from_slice(&(content.len() as u32).to_be_bytes());
            directory.extend_from_slice(&selector.to_be_bytes());
            directory.extend_from_slice(&[0; 2]);
            directory.extend_from_slice(name.as_bytes());
            directory.resize(directory.len() + NAME_SIZE - name.len(), 0);
            items.insert(selector, content.clone());
        }
        items.insert(FILE_DIRECTORY, directory);
        Self { items, cursor: Mutex::new((SIGNATURE, 0)) }
    }
}

impl Saves for FwCfg {
    fn save(&self) -> Value {
        encode(1, &*self.cursor.lock().unwrap())
    }

    fn restore(&self, state: &Value) -> Result<(), Unfit> {
        let (selected, read): (u16, usize) = decode(1, state)?;
        let len = self.items.get(&selected).map_or(0, Vec::len);
        fits("place in an item", read <= len)?;
        *self.cursor.lock().unwrap() = (selected, read);
        Ok(())
    }
}

impl BusDevice for FwCfg {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if offset != 1 || data.len() != 1 {
            return;
        }
        let (selected, read) = &mut *self.cursor.lock().unwrap();
        if let Some(byte) = self.items.get(selected).and_then(|item| item.get(*read)) {
            data[0] = *byte;
            *read += 1;
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (0, &[low, high]) = (offset, data) {
            *self.cursor.lock().unwrap() = (u16::from_le_bytes([low, high]), 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item(device: &FwCfg, selector: u16, len: usize) -> Vec<u8> {
        device.write(0, &selector.to_le_bytes());
        let byte = |_| {
            let mut data = [0xaa];
            device.read(1, &mut data);
            data[0]
        };
        (0..len).map(byte).collect()
    }

    #[test]
    fn fw_cfg_says_what_the_machine_has() {
        let device = FwCfg::new(1 << 32, 3, &[]);
        assert_eq!(item(&device, SIGNATURE, 6), b"QEMU\0\0");
        assert_eq!(item(&device, FEATURES, 4), [1, 0, 0, 0]);
        assert_eq!(item(&device, RAM_SIZE, 8), (1u64 << 32).to_le_bytes());
        assert_eq!((item(&device, CPUS, 2), item(&device, MAX_CPUS, 2)), (vec![3, 0], vec![3, 0]));
        assert_eq!(item(&device, 0x7777, 2), [0, 0]);
    }

    #[test]
    fn fw_cfg_serves_bytes_at_its_data_port_only() {
        let device = FwCfg::new(1 << 32, 3, &[]);
        let read = |offset, len| {
            let mut data = vec![0xaa; len];
            device.read(offset, &mut data);
            data
        };
        device.write(0, &SIGNATURE.to_le_bytes());
        assert_eq!((read(0, 1), read(1, 2), read(1, 1)), (vec![0], vec![0, 0], vec![b'Q']));
        // What is no selection changes none.
        device.write(0, &[FEATURES as u8]);
        device.write(1, &FEATURES.to_le_bytes());
        assert_eq!(read(1, 1), [b'E']);
        device.write(0, &SIGNATURE.to_le_bytes());
        assert_eq!(read(1, 1), [b'Q'], "from its beginning");
    }

    #[test]
    fn fw_cfg_files_are_found_by_the_directory() {
        let device = FwCfg::new(0, 1, &[("etc/one", vec![1]), ("etc/two", vec![2, 3])]);
        let directory = item(&device, FILE_DIRECTORY, 4 + 2 * 64);
        assert_eq!(directory[..4], 2u32.to_be_bytes());
        assert_eq!(directory[4..12], [0, 0, 0, 1, 0, FIRST_FILE as u8, 0, 0]);
        let second = &directory[4 + 64..];
        assert_eq!((&second[..4], &second[8..16]), (&2u32.to_be_bytes()[..], &b"etc/two\0"[..]));
        let selector = u16::from_be_bytes([second[4], second[5]]);
        assert_eq!(item(&device, selector, 3), [2, 3, 0]);
    }
}
