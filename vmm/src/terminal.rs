//! The user's terminal: raw while the guest runs, and as it was on every way out.

use std::io;
use std::sync::OnceLock;

/// The terminal's settings from before.
static BEFORE: OnceLock<libc::termios> = OnceLock::new();

fn settings() -> io::Result<libc::termios> {
    let mut settings = std::mem::MaybeUninit::uninit();
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

/// Whether stdin is a terminal and we are its foreground job. A background job that touches its terminal is stopped.
pub fn is_ours() -> bool {
    // SAFETY: these only ask.
    unsafe { libc::isatty(libc::STDIN_FILENO) == 1 && libc::tcgetpgrp(libc::STDIN_FILENO) == libc::getpgrp() }
}

/// Raw mode: every key goes to the guest. Output is still translated, for our own messages. [`restore`] undoes it, and a panic
/// does too.
pub fn make_raw() -> io::Result<()> {
    let before = settings()?;
    let mut raw = before;
    // SAFETY: this changes the structure only.
    unsafe { libc::cfmakeraw(&raw mut raw) };
    raw.c_oflag |= libc::OPOST;
    let _ = BEFORE.set(before);
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        restore();
        hook(info);
    }));
    apply(&raw)
}

/// Puts the terminal back, if it was changed.
pub fn restore() {
    if let Some(before) = BEFORE.get() {
        // Nothing is left to do when this fails: the terminal is gone.
        let _ = apply(before);
    }
}
