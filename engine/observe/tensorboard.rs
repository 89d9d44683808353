//! Event files as TensorBoard reads them: a sequence of records (TFRecord), each an `Event` message of
//! scalars. Both formats are small, and nothing of them but what is here is needed.

use crate::error::{Error, Result};
use crc_fast::{CrcAlgorithm, checksum};
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

// Fields of the message `Event`, of its `Summary`, of that one's `Value`, and of `SessionLog`.
const EVENT_WALL_TIME: u64 = 1;
const EVENT_STEP: u64 = 2;
const EVENT_FILE_VERSION: u64 = 3;
const EVENT_SUMMARY: u64 = 5;
const EVENT_SESSION_LOG: u64 = 7;
const SUMMARY_VALUE: u64 = 1;
const VALUE_TAG: u64 = 1;
const VALUE_SIMPLE_VALUE: u64 = 2;
const SESSION_LOG_STATUS: u64 = 1;

const FILE_VERSION: &str = "brain.Event:2";
/// The session log that says: what was written of this step and later ones before counts no more.
const SESSION_START: u64 = 1;

// How a field is encoded.
const VARINT: u64 = 0;
const FIXED_64: u64 = 1;
const BYTES: u64 = 2;
const FIXED_32: u64 = 5;

/// What the checksum of a record is rotated and increased by, so that a checksum of checksums is a sound one.
const MASK_ROTATION_BITS: u32 = 15;
const MASK_DELTA: u32 = 0xa282_ead8;

/// One file of events.
#[derive(Debug)]
pub struct EventFile {
    path: PathBuf,
    file: File,
}

impl EventFile {
    /// A new file in `directory`, which is made if it is not there. Steps after `after_step` that other files
    /// there hold count no more.
    ///
    /// # Errors
    /// [`Error::File`].
    pub fn create(directory: &Path, after_step: u64) -> Result<Self> {
        let failed = |path: &Path, source| Error::File { path: path.to_owned(), source };
        std::fs::create_dir_all(directory).map_err(|source| failed(directory, source))?;
        // TensorBoard reads files in the order of their names.
        let now = now_s();
        let name = format!("events.out.tfevents.{:020.6}.{}.ferrozero", now, std::process::id());
        let path = directory.join(name);
        let file = File::create_new(&path).map_err(|source| failed(&path, source))?;
        let mut this = Self { path, file };
        let mut version = event(now, 0);
        put_bytes(&mut version, EVENT_FILE_VERSION, FILE_VERSION.as_bytes());
        this.write(&version)?;
        let mut session = vec![];
        put_varint(&mut session, SESSION_LOG_STATUS << 3 | VARINT);
        put_varint(&mut session, SESSION_START);
        let mut start = event(now, after_step + 1);
        put_bytes(&mut start, EVENT_SESSION_LOG, &session);
        this.write(&start)?;
        Ok(this)
    }

    /// Appends the scalars of a step, by name.
    ///
    /// # Errors
    /// [`Error::File`].
    pub fn scalars(&mut self, step: u64, scalars: &[(&str, f64)]) -> Result<()> {
        let mut summary = vec![];
        for (name, scalar) in scalars {
            let mut value = vec![];
            put_bytes(&mut value, VALUE_TAG, name.as_bytes());
            put_varint(&mut value, VALUE_SIMPLE_VALUE << 3 | FIXED_32);
            value.extend((*scalar as f32).to_le_bytes());
            put_bytes(&mut summary, SUMMARY_VALUE, &value);
        }
        let mut event = event(now_s(), step);
        put_bytes(&mut event, EVENT_SUMMARY, &summary);
        self.write(&event)
    }

    /// Appends a record: its length, the length's checksum, the message, the message's checksum.
    fn write(&mut self, message: &[u8]) -> Result<()> {
        let length = (message.len() as u64).to_le_bytes();
        let mut record = length.to_vec();
        record.extend(masked_checksum(&length).to_le_bytes());
        record.extend(message);
        record.extend(masked_checksum(message).to_le_bytes());
        self.file.write_all(&record).map_err(Error::file(&self.path))
    }
}

fn now_s() -> f64 {
    // A clock before 1970 is no reason to stop training.
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

/// The beginning of an event.
fn event(wall_time_s: f64, step: u64) -> Vec<u8> {
    let mut event = vec![];
    put_varint(&mut event, EVENT_WALL_TIME << 3 | FIXED_64);
    event.extend(wall_time_s.to_le_bytes());
    put_varint(&mut event, EVENT_STEP << 3 | VARINT);
    put_varint(&mut event, step);
    event
}

fn put_bytes(message: &mut Vec<u8>, field: u64, bytes: &[u8]) {
    put_varint(message, field << 3 | BYTES);
    put_varint(message, bytes.len() as u64);
    message.extend(bytes);
}

/// Seven bits a byte, the low ones first; the high bit says that more follow.
fn put_varint(message: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        message.push(value as u8 | 0x80);
        value >>= 7;
    }
    message.push(value as u8);
}

fn masked_checksum(bytes: &[u8]) -> u32 {
    let crc = checksum(CrcAlgorithm::Crc32Iscsi, bytes) as u32;
    crc.rotate_right(MASK_ROTATION_BITS).wrapping_add(MASK_DELTA)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A field of a message: its number, and its value as bytes.
    fn fields(mut bytes: &[u8]) -> Vec<(u64, Vec<u8>)> {
        fn varint(bytes: &mut &[u8]) -> u64 {
            let mut value = 0;
            for shift in (0..).step_by(7) {
                let byte = bytes[0];
                *bytes = &bytes[1..];
                value |= u64::from(byte & 0x7f) << shift;
                if byte < 0x80 {
                    break;
                }
            }
            value
        }
        let mut found = vec![];
        while !bytes.is_empty() {
            let key = varint(&mut bytes);
            let length = match key & 7 {
                VARINT => {
                    let value = varint(&mut bytes);
                    found.push((key >> 3, value.to_le_bytes().to_vec()));
                    continue;
                }
                FIXED_64 => 8,
                BYTES => varint(&mut bytes) as usize,
                FIXED_32 => 4,
                other => panic!("{other}"),
            };
            found.push((key >> 3, bytes[..length].to_vec()));
            bytes = &bytes[length..];
        }
        found
    }

    fn field(fields: &[(u64, Vec<u8>)], number: u64) -> &[u8] {
        &fields.iter().find(|(found, _)| *found == number).unwrap().1
    }

    fn messages(path: &Path) -> Vec<Vec<u8>> {
        let file = std::fs::read(path).unwrap();
        let (mut bytes, mut found) = (file.as_slice(), vec![]);
        while !bytes.is_empty() {
            let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
            let crc = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
            let message = &bytes[12..12 + length];
            assert_eq!((crc(8), crc(12 + length)), (masked_checksum(&bytes[..8]), masked_checksum(message)));
            found.push(message.to_vec());
            bytes = &bytes[16 + length..];
        }
        found
    }

    #[test]
    fn the_checksum_is_that_of_the_format() {
        // The Castagnoli checksum of nine digits is known from its standard.
        assert_eq!(masked_checksum(b"123456789"), 0xe306_9283_u32.rotate_right(15).wrapping_add(0xa282_ead8));
    }

    #[test]
    fn scalars_come_back_from_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let directory = folder.path().join("events");
        let mut events = EventFile::create(&directory, 300).unwrap();
        let written = [
            ("loss", 1.0e-3),
            (
                "a name that is longer than the 127 bytes of one byte of a length, which is what a number of \
                 seven bits can say at the most",
                -2.5,
            ),
        ];
        events.scalars(301, &written).unwrap();
        events.scalars(302, &[("loss", f64::NAN)]).unwrap();
        let path = std::fs::read_dir(&directory).unwrap().next().unwrap().unwrap().path();
        let messages = messages(&path);
        assert_eq!(field(&fields(&messages[0]), EVENT_FILE_VERSION), FILE_VERSION.as_bytes());
        assert_eq!(field(&fields(&messages[1]), EVENT_STEP), 301_u64.to_le_bytes());
        assert_eq!(field(&fields(&messages[1]), EVENT_SESSION_LOG), [8, 1]);
        let event = fields(&messages[2]);
        assert_eq!(field(&event, EVENT_STEP), 301_u64.to_le_bytes());
        assert!(f64::from_le_bytes(field(&event, EVENT_WALL_TIME).try_into().unwrap()) > 0.0);
        let values = fields(field(&event, EVENT_SUMMARY));
        assert_eq!(values.len(), 2);
        for ((_, value), (name, scalar)) in values.iter().zip(written) {
            let value = fields(value);
            assert_eq!(field(&value, VALUE_TAG), name.as_bytes());
            assert_eq!(field(&value, VALUE_SIMPLE_VALUE), (scalar as f32).to_le_bytes());
        }
        assert_eq!(messages.len(), 4);
    }

    #[test]
    fn a_folder_that_cannot_be_made_is_named() {
        let error = EventFile::create(Path::new("/proc/nowhere"), 0).unwrap_err();
        assert!(error.to_string().contains("/proc/nowhere"), "{error}");
    }
}
