//! TensorBoard event files: scalars only. The format is a TFRecord per `Event` message
//! (tensorflow/core/util/event.proto), each with masked CRC-32C sums of its length and its bytes.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

/// Writes a file of scalars.
#[derive(Debug)]
pub struct EventWriter {
    file: BufWriter<File>,
}

impl EventWriter {
    /// Creates a file; `name` distinguishes runs in the same folder.
    pub fn create(folder: &Path, name: &str, wall_time: f64) -> io::Result<Self> {
        let path = folder.join(format!("events.out.tfevents.{:010}.{name}", wall_time as u64));
        let mut writer = Self { file: BufWriter::new(File::create(path)?) };
        let mut event = field_f64(1, wall_time);
        event.extend(field_bytes(3, b"brain.Event:2"));
        writer.record(&event)?;
        Ok(writer)
    }

    /// Appends one value of `tag`.
    pub fn scalar(&mut self, tag: &str, step: u64, value: f64, wall_time: f64) -> io::Result<()> {
        let mut summary_value = field_bytes(1, tag.as_bytes());
        summary_value.push(2 << 3 | 5); // simple_value, a float
        summary_value.extend((value as f32).to_le_bytes());
        let summary = field_bytes(1, &summary_value);
        let mut event = field_f64(1, wall_time);
        event.push(2 << 3); // step, a varint
        event.extend(varint(step));
        event.extend(field_bytes(5, &summary));
        self.record(&event)
    }

    /// Flushes the buffer to the file.
    pub fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }

    fn record(&mut self, bytes: &[u8]) -> io::Result<()> {
        let length = (bytes.len() as u64).to_le_bytes();
        self.file.write_all(&length)?;
        self.file.write_all(&masked_crc(&length).to_le_bytes())?;
        self.file.write_all(bytes)?;
        self.file.write_all(&masked_crc(bytes).to_le_bytes())
    }
}

fn masked_crc(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

fn varint(mut value: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while value >= 0x80 {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
    bytes
}

fn field_bytes(field: u8, value: &[u8]) -> Vec<u8> {
    let mut bytes = vec![field << 3 | 2];
    bytes.extend(varint(value.len() as u64));
    bytes.extend(value);
    bytes
}

fn field_f64(field: u8, value: f64) -> Vec<u8> {
    let mut bytes = vec![field << 3 | 1];
    bytes.extend(value.to_le_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_framed_and_summed() {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = EventWriter::create(folder.path(), "test", 1.5).unwrap();
        writer.scalar("loss", 300, 0.25, 2.0).unwrap();
        writer.flush().unwrap();
        let path = std::fs::read_dir(folder.path()).unwrap().next().unwrap().unwrap().path();
        let bytes = std::fs::read(path).unwrap();
        let mut at = 0;
        let mut records = Vec::new();
        while at < bytes.len() {
            let length = u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
            let sum = |range: std::ops::Range<usize>| masked_crc(&bytes[range]).to_le_bytes();
            assert_eq!(bytes[at + 8..at + 12], sum(at..at + 8));
            let end = at + 12 + length;
            assert_eq!(bytes[end..end + 4], sum(at + 12..end));
            records.push(bytes[at + 12..end].to_vec());
            at = end + 4;
        }
        // wall_time, step 300, summary { value { tag "loss", simple_value 0.25 } }
        let mut expected = vec![0x09];
        expected.extend(2.0f64.to_le_bytes());
        expected.extend([0x10, 0xac, 0x02, 0x2a, 13, 0x0a, 11, 0x0a, 4]);
        expected.extend(b"loss");
        expected.push(0x15);
        expected.extend(0.25f32.to_le_bytes());
        assert_eq!(records[1], expected);
    }
}
