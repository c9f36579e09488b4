//! Text on COM1.

use core::fmt::{self, Write};

use crate::x86::outsb;

const COM1: u16 = 0x3f8;

struct Port {
    line: [u8; 256],
    len: usize,
}

impl Port {
    fn flush(&mut self) {
        outsb(COM1, &self.line[..self.len]);
        self.len = 0;
    }
}

impl Write for Port {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            if self.len == self.line.len() {
                self.flush();
            }
            self.line[self.len] = byte;
            self.len += 1;
        }
        Ok(())
    }
}

/// Prints. See [`crate::println!`].
pub fn print(text: fmt::Arguments<'_>) {
    let mut port = Port { line: [0; 256], len: 0 };
    // It never fails.
    let _ = port.write_fmt(text);
    port.flush();
}

/// Prints a line on COM1.
#[macro_export]
macro_rules! println {
    ($($text:tt)*) => {
        $crate::serial::print(format_args!("{}\n", format_args!($($text)*)))
    };
}
