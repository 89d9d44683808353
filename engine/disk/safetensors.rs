//! Parameters to and from safetensors files, a part at a time.

use crate::error::{Error, Result, internal};
use crate::schedule::layout::Put;
use candle_core::DType;
use ferrozero_offload::{Access, Folder};
use half::{bf16, f16};
use safetensors::tensor::{Dtype, Metadata, TensorInfo};
use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Puts every value of the parameter of a name once, some at a time, in any order.
pub(crate) type PutAll<'a> = dyn Fn(&str, &mut Put) -> Result<()> + 'a;

/// Values that are converted at a time.
const PUT_ELEMENTS: usize = 64 * 1024;

/// Writes `parameters`, names and shapes, to a safetensors file in f32, in the memory that `put_all` needs. The file appears whole or
/// not at all.
///
/// # Errors
/// [`Error::File`] and what `put_all` answers.
pub(crate) fn export_safetensors(
    path: &Path,
    parameters: &[(String, Vec<usize>)],
    put_all: &PutAll,
) -> Result<()> {
    let above = path.parent().unwrap_or(Path::new(""));
    let folder = Folder::open(above).map_err(failed(above))?;
    let name = path.file_name().and_then(OsStr::to_str);
    let name = name.ok_or_else(|| failed(path)(io::ErrorKind::InvalidFilename.into()))?;
    let partial = format!("{name}.partial");
    let written = folder.open_file(&partial, Access::Replace).map_err(failed(path));
    let written = written.and_then(|file| {
        write_safetensors(path, &file, parameters, put_all)?;
        // What a full disk or a broken one has to say comes here at the latest, before the name.
        file.sync_all().map_err(failed(path))
    });
    let named = || folder.rename(&partial, name).and_then(|()| folder.sync()).map_err(failed(path));
    let written = written.and_then(|()| named());
    if written.is_err() {
        let _ = folder.unlink(&partial);
    }
    written
}

fn failed(path: &Path) -> impl Fn(io::Error) -> Error {
    Error::file(path)
}

/// Writes to `file` what is to be at `path`: the length of the table of contents, that table, and the tensors as it has them.
fn write_safetensors(
    path: &Path,
    file: &File,
    parameters: &[(String, Vec<usize>)],
    put_all: &PutAll,
) -> Result<()> {
    let mut parameters: Vec<_> = parameters.iter().collect();
    parameters.sort();
    let elements = |shape: &[usize]| shape.iter().product::<usize>();
    let ends = parameters.iter().scan(0, |end, (_, shape)| {
        *end += 4 * elements(shape);
        Some(*end)
    });
    let infos = parameters.iter().zip(ends).map(|((name, shape), end)| {
        let data_offsets = (end - 4 * elements(shape), end);
        (name.clone(), TensorInfo { dtype: Dtype::F32, shape: shape.clone(), data_offsets })
    });
    // transformers asks who wrote a file, and takes this answer for tensors as they are.
    let about = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let contents = Metadata::new(Some(about), infos.collect()).map_err(io::Error::other);
    let contents = contents.and_then(|contents| Ok(serde_json::to_vec(&contents)?));
    let mut contents = contents.map_err(failed(path))?;
    // The tensors begin at a multiple of 8.
    contents.resize(contents.len().next_multiple_of(8), b' ');
    file.write_all_at(&(contents.len() as u64).to_le_bytes(), 0).map_err(failed(path))?;
    file.write_all_at(&contents, 8).map_err(failed(path))?;
    let mut first_byte = 8 + contents.len() as u64;
    let mut bytes = Vec::with_capacity(4 * PUT_ELEMENTS);
    for (name, shape) in parameters {
        let all = elements(shape);
        let mut left = all;
        put_all(name, &mut |first, values| {
            left = left.checked_sub(values.len()).ok_or_else(|| internal("more values than a shape says"))?;
            let mut place = first_byte + 4 * first as u64;
            for values in values.chunks(PUT_ELEMENTS) {
                bytes.clear();
                bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
                file.write_all_at(&bytes, place).map_err(failed(path))?;
                place += bytes.len() as u64;
            }
            Ok(())
        })?;
        if left > 0 {
            return Err(internal("fewer values than a shape says"));
        }
        first_byte += 4 * all as u64;
    }
    Ok(())
}

/// A safetensors file, of which only the table of contents is in memory.
pub(crate) struct SafetensorsFile {
    path: PathBuf,
    pub(crate) file: File,
    /// Where the tensors' bytes begin.
    pub(crate) data_start: u64,
    pub(crate) tensors: HashMap<String, TensorInfo>,
}

/// Longest table of contents that is read, in bytes; the format's own limit.
const LONGEST_HEADER_BYTES: u64 = 100_000_000;

impl SafetensorsFile {
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let failed = Error::file(path);
        let damaged = |reason: String| Error::Safetensors { path: path.to_owned(), reason };
        let mut file = File::open(path).map_err(failed)?;
        let file_bytes = file.metadata().map_err(failed)?.len();
        let mut length = [0; 8];
        file.read_exact(&mut length).map_err(|_| damaged("it is shorter than a header".into()))?;
        let header_bytes = u64::from_le_bytes(length);
        if header_bytes > LONGEST_HEADER_BYTES.min(file_bytes.saturating_sub(8)) {
            return Err(damaged("it ends within its table of contents, or is no safetensors file".into()));
        }
        let mut header = vec![0; header_bytes as usize];
        file.read_exact(&mut header).map_err(failed)?;
        let metadata: Metadata = serde_json::from_slice(&header)
            .map_err(|error| damaged(format!("its table of contents cannot be read: {error}")))?;
        let data_start = 8 + header_bytes;
        let needed_bytes = data_start.saturating_add(metadata.data_len() as u64);
        if file_bytes < needed_bytes {
            let last = metadata.tensors().into_iter().max_by_key(|(_, info)| info.data_offsets.1);
            let name = last.map_or(String::new(), |(name, _)| name);
            return Err(damaged(format!(
                "it has {file_bytes} bytes and {needed_bytes} are needed for {name}"
            )));
        }
        let tensors: HashMap<String, TensorInfo> =
            metadata.tensors().into_iter().map(|(name, info)| (name, info.clone())).collect();
        if let Some((name, info)) =
            tensors.iter().find(|(_, info)| !is_in_place(info, file_bytes - data_start))
        {
            let (start, end) = info.data_offsets;
            return Err(damaged(format!(
                "bytes {start} to {end} cannot be {name} of shape {:?} in {:?}",
                info.shape, info.dtype
            )));
        }
        Ok(Self { path: path.to_owned(), file, data_start, tensors })
    }

    /// Fills `out` with the elements of a tensor from `first` on.
    pub(crate) fn fill(&self, name: &str, first: usize, out: &mut [f32]) -> Result<()> {
        let damaged = |reason: String| Error::Safetensors { path: self.path.clone(), reason };
        let info = self.tensors.get(name).ok_or_else(|| damaged(format!("it has no {name}")))?;
        let dtype = number_type(info.dtype).ok_or_else(|| {
            damaged(format!("{name} is of type {:?}; F32, BF16 and F16 can be imported", info.dtype))
        })?;
        let size = dtype.size_in_bytes();
        let mut place = self.data_start + (info.data_offsets.0 + first * size) as u64;
        let mut bytes = vec![0; size * out.len().min(PUT_ELEMENTS)];
        for part in out.chunks_mut(PUT_ELEMENTS) {
            let bytes = &mut bytes[..size * part.len()];
            let failed = Error::file(&self.path);
            self.file.read_exact_at(bytes, place).map_err(failed)?;
            decode(dtype, bytes, part);
            place += bytes.len() as u64;
        }
        Ok(())
    }
}

/// Candle's name of a type that parameters are read from.
pub(crate) fn number_type(dtype: Dtype) -> Option<DType> {
    match dtype {
        Dtype::F32 => Some(DType::F32),
        Dtype::BF16 => Some(DType::BF16),
        Dtype::F16 => Some(DType::F16),
        _ => None,
    }
}

/// Turns numbers of a type as they lie in a file into f32.
pub(crate) fn decode(dtype: DType, bytes: &[u8], out: &mut [f32]) {
    let words = bytes.chunks_exact(dtype.size_in_bytes());
    for (target, word) in out.iter_mut().zip(words) {
        *target = match *word {
            [a, b, c, d] => f32::from_le_bytes([a, b, c, d]),
            [a, b] if dtype == DType::BF16 => bf16::from_le_bytes([a, b]).to_f32(),
            [a, b] => f16::from_le_bytes([a, b]).to_f32(),
            _ => f32::NAN,
        };
    }
}

/// Whether a tensor's bytes are as many as its shape says, and within the `data_bytes` of its file.
fn is_in_place(info: &TensorInfo, data_bytes: u64) -> bool {
    let (start, end) = info.data_offsets;
    let elements = info.shape.iter().try_fold(1_usize, |elements, &size| elements.checked_mul(size));
    let bits = elements.and_then(|elements| elements.checked_mul(info.dtype.bitsize()));
    let bytes = end.checked_sub(start);
    end as u64 <= data_bytes
        && bits.is_some_and(|bits| bytes.and_then(|bytes| bytes.checked_mul(8)) == Some(bits))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_of_contents_that_cannot_be_is_an_error_and_no_panic() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        let open = |entry: &str| {
            let header = format!("{{\"w\":{entry}}}");
            let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
            bytes.extend(header.bytes());
            bytes.extend([0; 16]);
            std::fs::write(&path, bytes).unwrap();
            SafetensorsFile::open(&path).and_then(|file| {
                let mut values = [1.0; 3];
                file.fill("w", 1, &mut values)?;
                Ok(values)
            })
        };
        assert_eq!(open(r#"{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}"#).unwrap(), [0.0; 3]);
        for entry in [
            r#"{"dtype":"F32","shape":[2,2],"data_offsets":[16,0]}"#,
            r#"{"dtype":"F32","shape":[2,2],"data_offsets":[0,12]}"#,
            r#"{"dtype":"F32","shape":[2,2],"data_offsets":[8,24]}"#,
            r#"{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,16]}"#,
            r#"{"dtype":"F32","shape":[2,2],"data_offsets":[0,18446744073709551615]}"#,
        ] {
            let error = open(entry).unwrap_err().to_string();
            assert!(error.contains("model.safetensors"), "{entry}: {error}");
        }
    }
}
