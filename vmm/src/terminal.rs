//! The user's terminal: raw while it is ours and the guest runs, and as it was on every way out, for good or for a
//! while.

use std::io;
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicPtr, Ordering};
use std::sync::{Mutex, MutexGuard, Once, PoisonError};

/// What the terminal is to us.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Terminal {
    /// Raw: what is typed is the guest's, but for Ctrl-A.
    Ours,
    /// Another job of this session has it. A job that takes it all the same takes it from the shell.
    Others,
    /// stdin is no terminal, or not one with jobs.
    None,
}

/// Held by whoever changes the terminal; whether it is given back for good.
static CHANGING: Mutex<bool> = Mutex::new(false);
/// The settings from before. Leaked: a handler may be reading them.
static BEFORE: AtomicPtr<libc::termios> = AtomicPtr::new(std::ptr::null_mut());
/// Whether it is raw.
static RAW: AtomicBool = AtomicBool::new(false);
/// A signal ends the process: nobody makes it raw any more.
static ENDING: AtomicBool = AtomicBool::new(false);
/// The thread that is about to make it raw; 0 for none.
static MAKING_RAW: AtomicI32 = AtomicI32::new(0);

/// Signals whose default action ends the process and that nothing else in this program handles, or that only a fault of
/// ours raises.
const FATAL: [libc::c_int; 16] = [
    libc::SIGABRT,
    libc::SIGBUS,
    libc::SIGSEGV,
    libc::SIGILL,
    libc::SIGFPE,
    libc::SIGTRAP,
    libc::SIGSYS,
    libc::SIGXCPU,
    libc::SIGXFSZ,
    libc::SIGUSR2,
    libc::SIGALRM,
    libc::SIGVTALRM,
    libc::SIGPROF,
    libc::SIGIO,
    libc::SIGPWR,
    libc::SIGSTKFLT,
];
/// More than the largest of them.
const SIGNALS: usize = 32;
/// What was to be done at each of them before, to be done afterwards. Leaked, as above.
static PREVIOUS: [AtomicPtr<libc::sigaction>; SIGNALS] = [const { AtomicPtr::new(std::ptr::null_mut()) }; SIGNALS];

fn settings() -> io::Result<libc::termios> {
    let mut settings = MaybeUninit::uninit();
    // SAFETY: tcgetattr fills the structure when it succeeds, and only then it is used.
    match unsafe { libc::tcgetattr(libc::STDIN_FILENO, settings.as_mut_ptr()) } {
        // SAFETY: as above.
        0 => Ok(unsafe { settings.assume_init() }),
        _ => Err(io::Error::last_os_error()),
    }
}

fn apply(settings: &libc::termios) -> io::Result<()> {
    // SAFETY: the structure came from tcgetattr.
    match unsafe { libc::tcsetattr(libc::STDIN_FILENO, libc::TCSANOW, settings) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// What it is now, untouched.
fn look() -> Terminal {
    // SAFETY: these only ask.
    let (terminal, foreground, we) =
        unsafe { (libc::isatty(libc::STDIN_FILENO) == 1, libc::tcgetpgrp(libc::STDIN_FILENO), libc::getpgrp()) };
    match foreground {
        _ if !terminal => Terminal::None,
        // Not the terminal of our session.
        -1 => Terminal::None,
        foreground if foreground == we => Terminal::Ours,
        _ => Terminal::Others,
    }
}

fn lock() -> MutexGuard<'static, bool> {
    CHANGING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Makes the terminal raw if it is ours: every key goes to the guest. Output is still translated, for our own messages.
/// [`give_back`] undoes it, and every way in which the process can end does too, but for SIGKILL.
pub fn take() -> Terminal {
    enter(false)
}

/// As [`take`]; with `again` also where we made it raw already, and somebody else may have changed it since.
fn enter(again: bool) -> Terminal {
    let given_back = lock();
    let is = look();
    if is != Terminal::Ours {
        // Whoever has it has it as they want it.
        RAW.store(false, Ordering::SeqCst);
        return is;
    }
    if *given_back || (RAW.load(Ordering::SeqCst) && !again) {
        return is;
    }
    if !RAW.load(Ordering::SeqCst) {
        let Ok(before) = settings() else { return Terminal::None };
        BEFORE.store(Box::into_raw(Box::new(before)), Ordering::SeqCst);
        static HANDLERS: Once = Once::new();
        HANDLERS.call_once(restore_at_faults);
    }
    // SAFETY: it was stored above, now or earlier, and such a structure is never freed.
    let mut raw = unsafe { *BEFORE.load(Ordering::SeqCst) };
    // SAFETY: this changes the structure only.
    unsafe { libc::cfmakeraw(&raw mut raw) };
    raw.c_oflag |= libc::OPOST;
    // Either this sees that the process ends, or the handler that ends it sees this and waits.
    MAKING_RAW.store(this_thread(), Ordering::SeqCst);
    if !ENDING.load(Ordering::SeqCst) {
        RAW.store(true, Ordering::SeqCst);
        if let Err(e) = apply(&raw) {
            log::warn!("the terminal cannot be made raw: {e}");
        }
    }
    MAKING_RAW.store(0, Ordering::SeqCst);
    is
}

/// Puts the terminal back, if it was changed: system calls and atomics only, for handlers of signals.
fn restore() {
    if !RAW.swap(false, Ordering::SeqCst) || look() != Terminal::Ours {
        return;
    }
    // SAFETY: it was stored before RAW was set, and such a structure is never freed.
    if let Some(before) = unsafe { BEFORE.load(Ordering::SeqCst).as_ref() } {
        // Nothing is left to do when this fails: the terminal is gone.
        let _ = apply(before);
    }
}

fn this_thread() -> libc::pid_t {
    // SAFETY: this only asks.
    unsafe { libc::gettid() }
}

/// Puts the terminal back in a process that is about to end, for handlers of signals. Another thread may be making it
/// raw at this moment: that is waited for, for about a second at most.
fn restore_at_end() {
    ENDING.store(true, Ordering::SeqCst);
    for _ in 0..1000 {
        let making = MAKING_RAW.load(Ordering::SeqCst);
        if making == 0 || making == this_thread() {
            break;
        }
        let time = libc::timespec { tv_sec: 0, tv_nsec: 1_000_000 };
        // SAFETY: the structure lives until the call returns.
        unsafe { libc::nanosleep(&raw const time, std::ptr::null_mut()) };
    }
    restore();
}

/// Puts the terminal back for good.
pub fn give_back() {
    let mut given_back = lock();
    *given_back = true;
    restore();
}

/// Puts the terminal back, stops this process, and takes the terminal again when it is continued.
pub fn suspend() {
    {
        let _changing = lock();
        restore();
    }
    // SAFETY: this sends a signal to ourselves, and returns when we are continued.
    unsafe { libc::raise(libc::SIGSTOP) };
    resume();
}

/// This process was continued: the terminal may be ours again, and not as we left it.
pub fn resume() {
    // Before there is a console, it is not raw and stays as it is.
    if !BEFORE.load(Ordering::SeqCst).is_null() {
        enter(true);
    }
}

/// From now on a panic, and each signal in [`FATAL`], puts the terminal back first.
fn restore_at_faults() {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        restore();
        hook(info);
    }));
    for signal in FATAL {
        let mut previous = MaybeUninit::<libc::sigaction>::zeroed();
        // SAFETY: both structures are ours; all zeroes are a valid sigaction without flags and mask. The handler does
        // what a handler may: system calls and atomics. It runs on the stack that the runtime made for faults.
        let done = unsafe {
            let mut action = MaybeUninit::<libc::sigaction>::zeroed().assume_init();
            action.sa_sigaction = restore_and_go_on as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            // Kept first: the handler may run at once.
            if libc::sigaction(signal, std::ptr::null(), previous.as_mut_ptr()) != 0 {
                continue;
            }
            let previous = Box::into_raw(Box::new(previous.assume_init()));
            PREVIOUS[signal as usize % SIGNALS].store(previous, Ordering::SeqCst);
            // One that is ignored ends nobody.
            (*previous).sa_sigaction == libc::SIG_IGN
                || libc::sigaction(signal, &raw const action, std::ptr::null_mut()) == 0
        };
        if !done {
            log::debug!("signal {signal} will leave the terminal raw");
        }
    }
}

extern "C" fn restore_and_go_on(signal: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    restore_at_end();
    // SAFETY: `info` is the kernel's.
    let is_fault =
        unsafe { (*info).si_code } > 0 && matches!(signal, libc::SIGBUS | libc::SIGSEGV | libc::SIGILL | libc::SIGFPE);
    // SAFETY: the pointer was stored before this handler was there, and is never freed; sigaction, signal and raise may
    // be called in a handler.
    unsafe {
        if is_fault {
            // It comes again when this returns, and whoever was asked before explains it.
            libc::sigaction(signal, PREVIOUS[signal as usize % SIGNALS].load(Ordering::SeqCst), std::ptr::null_mut());
        } else {
            libc::signal(signal, libc::SIG_DFL);
            libc::raise(signal);
        }
    }
}
