//! What is in a picture.

use anyhow::{Context, Result, ensure};
use std::collections::HashMap;
use std::fs::File;
use std::io::BufReader;
use std::path::Path;

/// Red, green, blue.
pub type Colour = [u8; 3];

/// A picture, decoded.
pub struct Pixels {
    /// Columns.
    pub width: u32,
    /// Rows.
    pub height: u32,
    /// How many pixels have each colour.
    counts: HashMap<Colour, usize>,
}

impl Pixels {
    /// Of a PNG with eight bits a channel, as browsers write them.
    pub fn read(file: &Path) -> Result<Self> {
        let name = file.display();
        let mut reader = png::Decoder::new(BufReader::new(File::open(file)?)).read_info()?;
        let size = reader.output_buffer_size().with_context(|| format!("{name} is too large"))?;
        let mut bytes = vec![0; size];
        let info = reader.next_frame(&mut bytes).with_context(|| format!("{name} is no whole PNG"))?;
        let channels = info.color_type.samples();
        ensure!(info.bit_depth == png::BitDepth::Eight && channels >= 3, "{name} is of another kind of PNG");
        let mut counts = HashMap::new();
        for pixel in bytes[..info.buffer_size()].chunks_exact(channels) {
            *counts.entry([pixel[0], pixel[1], pixel[2]]).or_default() += 1;
        }
        Ok(Self { width: info.width, height: info.height, counts })
    }

    /// How many colours there are.
    pub fn colours(&self) -> usize {
        self.counts.len()
    }

    /// How many pixels are of this colour.
    pub fn count(&self, colour: Colour) -> usize {
        self.counts.get(&colour).copied().unwrap_or(0)
    }

    /// The colour that most pixels have.
    pub fn commonest(&self) -> Colour {
        self.counts.iter().max_by_key(|(colour, count)| (**count, **colour)).map_or([0; 3], |(colour, _)| *colour)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pixels_of_a_picture_are_counted() {
        let file = std::env::temp_dir().join(format!("causeway-pixels-{}.png", std::process::id()));
        let mut encoder = png::Encoder::new(File::create(&file).unwrap(), 3, 1);
        encoder.set_color(png::ColorType::Rgba);
        let pixels = [1, 2, 3, 255, 9, 9, 9, 255, 1, 2, 3, 255];
        encoder.write_header().unwrap().write_image_data(&pixels).unwrap();
        let seen = Pixels::read(&file);
        std::fs::write(&file, b"no picture").unwrap();
        let none = Pixels::read(&file);
        std::fs::remove_file(&file).unwrap();
        let seen = seen.unwrap();
        assert_eq!((seen.width, seen.height, seen.colours()), (3, 1, 2));
        assert_eq!((seen.count([1, 2, 3]), seen.count([0; 3]), seen.commonest()), (2, 0, [1, 2, 3]));
        assert!(none.is_err());
    }
}
