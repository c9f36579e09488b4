//! `causeway device`: an emulated device in a process of its own, for virtual machines of other processes, by
//! vfio-user.
//!
//! The model is the one that `causeway run --device edu` has inside; here its DMA goes by the memory that the client
//! maps for it, and its interrupts by the client's eventfds, as those of a function of the host do through the kernel's
//! VFIO.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, Mutex, MutexGuard};

use clap::{Args, ValueEnum};
use devices::Bus;
use devices::dma::{DmaFailed, DmaTarget};
use devices::edu::{BAR_SIZE, Edu};
use devices::host::{Interrupts, IrqLine, IrqRoute};
use devices::pci::config::CONFIG_SIZE;
use devices::pci::{Decoder, PciFunction};
use devices::saved::{Saves, hex};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use vfio_bridge::vfio_user::{ClientMemory, Served, ServedState, serve};
use vfio_bridge::{IrqKind, RegionKind};
use vtd::spec::INTERRUPT_WINDOW;
use vtd::{Iova, Msi, Requester, SourceId};

use crate::commands::options;
use crate::exit::{ERROR, REFUSED};
use crate::listening;
use crate::signals::{self, Signals, Woken};

/// `causeway device`.
#[derive(Args, Debug)]
#[command(after_help = "\
The process serves one client after the other until it is ended by a signal; with --fd it ends with its client. Exit codes: 0 the client of
--fd closed the connection; 2 usage; 4 it could not start; 6 an error while it ran.")]
pub struct DeviceArgs {
    /// The device
    kind: Kind,
    /// Listen here; `causeway run --device vfio-user,socket=PATH` connects
    #[arg(long, value_name = "PATH", required_unless_present = "fd", conflicts_with = "fd")]
    socket: Option<PathBuf>,
    /// Serve the client at the other end of this descriptor, a connected socket that the process was started with
    #[arg(long, value_name = "N", value_parser = options::descriptor)]
    fd: Option<i32>,
}

#[derive(ValueEnum, Clone, Copy, Debug)]
enum Kind {
    /// The teaching device that QEMU has, too: DMA, and an interrupt
    Edu,
}

/// Does what the command line says. Gives back the exit code.
pub fn run(args: &DeviceArgs) -> ExitCode {
    let environment = env_logger::Env::default().default_filter_or("info");
    let format = |out: &mut env_logger::fmt::Formatter, record: &log::Record<'_>| {
        writeln!(out, "causeway device: {}: {}", record.level().as_str().to_ascii_lowercase(), record.args())
    };
    env_logger::Builder::from_env(environment).format(format).init();
    let Kind::Edu = args.kind;
    let result = match (&args.fd, &args.socket) {
        (Some(fd), _) => serve_descriptor(*fd),
        (None, Some(path)) => serve_path(path),
        // The command line has one of the two.
        (None, None) => Ok(()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(Stopped { code, message }) => {
            log::error!("{message}");
            ExitCode::from(code)
        }
    }
}

/// Why the process ends, and its exit code.
struct Stopped {
    code: u8,
    message: String,
}

fn refused(message: String) -> Stopped {
    Stopped { code: REFUSED, message }
}

fn serve_descriptor(fd: i32) -> Result<(), Stopped> {
    let is_socket = fs::metadata(format!("/proc/self/fd/{fd}")).is_ok_and(|file| file.file_type().is_socket());
    if !is_socket {
        return Err(refused(format!("descriptor {fd} is not a socket")));
    }
    // SAFETY: it is open, no socket was opened by this process, and whoever started the process gave it for this.
    let stream = UnixStream::from(unsafe { OwnedFd::from_raw_fd(fd) });
    let edu = ServedEdu::new().map_err(|e| refused(format!("the device could not be made: {e}")))?;
    serve(&stream, &edu, &edu.memory).map_err(|e| Stopped { code: ERROR, message: e.to_string() })
}

fn serve_path(path: &Path) -> Result<(), Stopped> {
    // Before any thread exists, so that none of them gets these signals.
    let signals = Signals::block().map_err(|e| refused(format!("signals cannot be waited for: {e}")))?;
    let edu = ServedEdu::new().map_err(|e| refused(format!("the device could not be made: {e}")))?;
    // Nothing fails from here on: its file is removed at the end.
    let listener = listen(path).map_err(|e| refused(format!("{} cannot be listened at: {e}", path.display())))?;
    log::info!("edu is served at {}", path.display());
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            match stream {
                Ok(stream) => {
                    if let Err(e) = serve(&stream, &edu, &edu.memory) {
                        log::warn!("{e}");
                    }
                    edu.power_on();
                }
                Err(e) => log::warn!("a client could not be accepted: {e}"),
            }
        }
    });
    let woken = signals.wait(None, None);
    if let Err(e) = fs::remove_file(path) {
        log::warn!("{} could not be removed: {e}", path.display());
    }
    match woken {
        Ok(Woken::Ended(signal)) => signals::die_by(signal),
        // Nothing else was waited for.
        Ok(Woken::Event | Woken::TimedOut) => Ok(()),
        Err(e) => Err(Stopped { code: ERROR, message: format!("signals cannot be waited for: {e}") }),
    }
}

/// Listens at `path`, in place of a socket that nobody listens at any more.
fn listen(path: &Path) -> io::Result<UnixListener> {
    match listening::listen(path) {
        Err(e) if e.kind() == io::ErrorKind::AddrInUse => {
            let left_behind = fs::metadata(path)?.file_type().is_socket()
                && UnixStream::connect(path).is_err_and(|e| e.kind() == io::ErrorKind::ConnectionRefused);
            if !left_behind {
                return Err(e);
            }
            fs::remove_file(path)?;
            listening::listen(path)
        }
        result => result,
    }
}

/// The device, as the kernel's VFIO would show it.
struct ServedEdu {
    edu: Arc<Edu>,
    memory: Arc<ClientMemory>,
    lines: Arc<Lines>,
    /// What the client wrote as the message of the MSI capability. As with the kernel's VFIO it is the client's alone:
    /// clients pass their guest's writes on, and the device's message stays the eventfd.
    message: Mutex<[u8; MESSAGE_MASK.len()]>,
}

/// Where the message is in the MSI capability (64 bits of address, 16 of data), and which bits of it can be written.
const MESSAGE: u16 = 4;
const MESSAGE_MASK: [u8; 12] = [0xfc, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0];

impl ServedEdu {
    fn new() -> io::Result<Self> {
        let memory = Arc::new(ClientMemory::default());
        let lines = Arc::new(Lines { memory: memory.clone(), state: Mutex::default() });
        // Where it is in its client's machine is the client's affair.
        let requester = Requester { segment: 0, sid: SourceId::new(0, 0, 0) };
        let decoder = Arc::new(Decoder::new(Arc::new(Bus::default())));
        let line: Arc<dyn IrqLine> = lines.clone();
        let dma = Box::new(UserMemory(memory.clone()));
        let edu = Edu::new(requester, decoder, lines.clone(), Some((line, 0xff)), dma)?;
        Ok(Self { edu, memory, lines, message: Mutex::default() })
    }

    /// Where `at` of configuration space is in the message of the MSI capability, if it is there.
    fn in_message(&self, at: u16) -> Option<usize> {
        let place = usize::from(at.checked_sub(self.edu.msi_capability() + MESSAGE)?);
        (place < MESSAGE_MASK.len()).then_some(place)
    }

    /// Reads at most a word of configuration space.
    fn config_read(&self, at: u16, data: &mut [u8]) {
        match self.in_message(at) {
            Some(place) => data.copy_from_slice(&self.message.lock().unwrap()[place..place + data.len()]),
            None => self.edu.config_read(at, data),
        }
    }

    /// Writes at most a word of configuration space.
    fn config_write(&self, at: u16, data: &[u8]) {
        match self.in_message(at) {
            Some(place) => {
                let mut message = self.message.lock().unwrap();
                let bytes = message[place..].iter_mut().zip(&MESSAGE_MASK[place..]);
                bytes.zip(data).for_each(|((byte, mask), new)| *byte = new & mask);
            }
            None => self.edu.config_write(at, data),
        }
    }

    /// The next client, or the client's guest after a reset, finds it as the first one did.
    fn power_on(&self) {
        *self.message.lock().unwrap() = Default::default();
        self.edu.reset();
    }
}

impl Served for ServedEdu {
    fn region_size(&self, region: RegionKind) -> u64 {
        match region {
            RegionKind::Bar(0) => BAR_SIZE,
            RegionKind::Config => CONFIG_SIZE as u64,
            _ => 0,
        }
    }

    fn irq_count(&self, kind: IrqKind) -> u32 {
        matches!(kind, IrqKind::Intx | IrqKind::Msi).into()
    }

    fn read(&self, region: RegionKind, offset: u64, data: &mut [u8]) {
        match region {
            RegionKind::Bar(_) => self.edu.bar().read(offset, data),
            _ => words(offset, data.len()).for_each(|(at, range)| self.config_read(at, &mut data[range])),
        }
    }

    fn write(&self, region: RegionKind, offset: u64, data: &[u8]) {
        match region {
            RegionKind::Bar(_) => self.edu.bar().write(offset, data),
            _ => words(offset, data.len()).for_each(|(at, range)| self.config_write(at, &data[range])),
        }
    }

    fn set_irqs(&self, kind: IrqKind, _: u32, triggers: Vec<Option<File>>) {
        let Some(trigger) = triggers.into_iter().next() else { return };
        let on = trigger.is_some();
        match kind {
            IrqKind::Intx => self.lines.state().connect_line(trigger),
            IrqKind::Msi => {
                self.lines.state().message = trigger;
                self.enable_msi(on);
            }
            _ => {}
        }
    }

    fn disable_irqs(&self, kind: IrqKind) {
        self.set_irqs(kind, 0, vec![None]);
    }

    fn mask_intx(&self) {
        self.lines.state().masked = true;
    }

    fn unmask_intx(&self) {
        self.lines.state().unmask_line();
    }

    fn reset(&self) {
        self.power_on();
    }

    fn state(&self) -> Option<&dyn ServedState> {
        Some(self)
    }
}

/// What another process needs to be this device.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct EduState {
    edu: Value,
    /// What the client wrote as the message.
    #[serde(with = "hex")]
    message: Vec<u8>,
}

impl ServedState for ServedEdu {
    fn stop(&self) {
        // A transfer of it ends: nothing is waited for but the client's answers, which have a deadline there.
        if let Err(e) = self.edu.hold() {
            log::warn!("{e}");
        }
    }

    fn go_on(&self) {
        Saves::go_on(&*self.edu);
    }

    fn save(&self) -> Vec<u8> {
        let message = self.message.lock().unwrap().to_vec();
        // It has nothing that JSON has not.
        serde_json::to_vec(&EduState { edu: Saves::save(&*self.edu), message }).unwrap_or_default()
    }

    fn load(&self, state: &[u8]) -> Result<(), String> {
        let EduState { edu, message } = serde_json::from_slice(state).map_err(|e| format!("not understood: {e}"))?;
        let message: [u8; MESSAGE_MASK.len()] = message.try_into().map_err(|_| "a message of another length")?;
        if message.iter().zip(MESSAGE_MASK).any(|(byte, mask)| byte & !mask != 0) {
            return Err("a message that cannot be written".to_owned());
        }
        self.edu.restore(&edu).map_err(|e| e.to_string())?;
        *self.message.lock().unwrap() = message;
        // Where its interrupts go is this client's.
        let on = self.lines.state().message.is_some();
        self.enable_msi(on);
        Ok(())
    }
}

impl ServedEdu {
    /// In the device's own capability, as the kernel does it for a real one: what the guest writes there stays with the
    /// client.
    fn enable_msi(&self, on: bool) {
        self.edu.config_write(self.edu.msi_capability() + 2, &[on.into()]);
    }
}

/// An access to configuration space in parts of at most a word: where each is, and which bytes.
fn words(offset: u64, len: usize) -> impl Iterator<Item = (u16, std::ops::Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let at = offset + done as u64;
        let part = (4 - (at % 4) as usize).min(len - done);
        let range = done..done + part;
        done += part;
        // The region has 4 KiB.
        (part > 0).then_some((at as u16, range))
    })
}

/// The memory of the client.
struct UserMemory(Arc<ClientMemory>);

impl DmaTarget for UserMemory {
    fn read(&self, iova: Iova, data: &mut [u8]) -> Result<(), DmaFailed> {
        self.0.read(iova, data).map_err(|_| DmaFailed)
    }
    fn write(&self, iova: Iova, data: &[u8]) -> Result<(), DmaFailed> {
        self.0.write(iova, data).map_err(|_| DmaFailed)
    }
}

/// Where the device's interrupts go.
struct Lines {
    memory: Arc<ClientMemory>,
    state: Mutex<LineState>,
}

#[derive(Default)]
struct LineState {
    /// The eventfd of the one message.
    message: Option<File>,
    /// That of the legacy line.
    line: Option<File>,
    high: bool,
    /// It fired, or the client masked it, and the client did not unmask it since.
    masked: bool,
}

fn fire(trigger: Option<&File>) {
    if let Some(mut trigger) = trigger
        && let Err(e) = trigger.write_all(&1u64.to_ne_bytes())
    {
        log::debug!("an eventfd of the client could not be signalled: {e}");
    }
}

impl LineState {
    fn connect_line(&mut self, trigger: Option<File>) {
        self.line = trigger;
        self.unmask_line();
    }

    fn unmask_line(&mut self) {
        self.masked = false;
        self.update();
    }

    /// Level-triggered: fires once, until it is unmasked.
    fn update(&mut self) {
        if self.high && !self.masked && self.line.is_some() {
            self.masked = true;
            fire(self.line.as_ref());
        }
    }
}

impl Lines {
    fn state(&self) -> MutexGuard<'_, LineState> {
        self.state.lock().unwrap()
    }
}

impl Interrupts for Lines {
    fn route(&self, _: Requester) -> io::Result<Arc<dyn IrqRoute>> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn set_routes(&self, _: &[(Arc<dyn IrqRoute>, Option<Msi>)]) {
        // It hands out none.
    }

    fn signal(&self, _: Requester, msi: Msi) {
        if INTERRUPT_WINDOW.contains(msi.address) {
            // Written by DMA: the client, whose unit remaps it, is asked.
            let written = self.memory.write(Iova(msi.address), &msi.data.to_le_bytes());
            return written.unwrap_or_else(|e| log::debug!("a message was not taken: {e}"));
        }
        // The address and data of the capability are the client's; here they are 0.
        fire(self.state().message.as_ref());
    }
}

impl IrqLine for Lines {
    fn set_level(&self, high: bool) {
        let mut state = self.state();
        state.high = high;
        state.update();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accesses_to_configuration_space_are_cut_into_words() {
        let parts: Vec<_> = words(0x3e, 9).collect();
        assert_eq!(parts, [(0x3e, 0..2), (0x40, 2..6), (0x44, 6..9)]);
        assert_eq!(words(4, 0).count(), 0);
    }

    #[test]
    fn the_message_that_a_client_writes_stays_with_it_and_its_eventfd_is_signalled() {
        let served = ServedEdu::new().unwrap();
        let at = |offset: u16| u64::from(served.edu.msi_capability() + offset);
        let read = |offset, len: usize| {
            let mut data = vec![0; len];
            served.read(RegionKind::Config, at(offset), &mut data);
            data
        };
        // As QEMU's client passes it on from its guest, whole and in parts; the lowest bits of the address are fixed.
        served.write(RegionKind::Config, at(4), &0xfee0_0218_u64.to_le_bytes());
        served.write(RegionKind::Config, at(12), &[0x41, 0x40]);
        served.write(RegionKind::Config, at(4), &[0x1b]);
        assert_eq!(read(4, 12), [0x18, 0x02, 0xe0, 0xfe, 0, 0, 0, 0, 0x41, 0x40, 0, 0]);
        assert_eq!(read(0, 2)[0], 5, "the capability's id is the device's");

        let event = vmm_sys_util::eventfd::EventFd::new(vmm_sys_util::eventfd::EFD_NONBLOCK).unwrap();
        // Its memory and Bus Master.
        served.write(RegionKind::Config, 4, &[6, 0]);
        served.set_irqs(IrqKind::Msi, 0, vec![Some(file_of(&event))]);
        served.write(RegionKind::Bar(0), 0x60, &1u32.to_le_bytes());
        assert_eq!(event.read().unwrap(), 1);

        served.reset();
        assert_eq!(read(4, 12), [0; 12]);
    }

    fn file_of(event: &vmm_sys_util::eventfd::EventFd) -> File {
        use std::os::fd::{AsRawFd, BorrowedFd};
        // SAFETY: `event` lives as long as the borrow.
        let fd = unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) };
        File::from(fd.try_clone_to_owned().unwrap())
    }

    #[test]
    fn the_line_is_silent_while_it_is_masked() {
        let event = vmm_sys_util::eventfd::EventFd::new(vmm_sys_util::eventfd::EFD_NONBLOCK).unwrap();
        let served = ServedEdu::new().unwrap();
        served.set_irqs(IrqKind::Intx, 0, vec![Some(file_of(&event))]);
        served.mask_intx();
        served.lines.set_level(true);
        assert!(event.read().is_err());
        served.unmask_intx();
        assert_eq!(event.read().unwrap(), 1);
    }

    #[test]
    fn the_line_fires_once_until_it_is_unmasked() {
        let event = vmm_sys_util::eventfd::EventFd::new(vmm_sys_util::eventfd::EFD_NONBLOCK).unwrap();
        let trigger = || Some(file_of(&event));
        let mut state = LineState { high: true, ..LineState::default() };
        state.connect_line(trigger());
        assert_eq!(event.read().unwrap(), 1);
        state.update();
        assert!(event.read().is_err());
        state.unmask_line();
        assert_eq!(event.read().unwrap(), 1);
        state.high = false;
        state.unmask_line();
        assert!(event.read().is_err());
    }
}
