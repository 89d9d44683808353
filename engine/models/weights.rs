//! Weights of a model that others have trained, read from their files a piece at a time: a Hugging Face
//! folder with safetensors files, or a GGUF file, whose blocks are turned into numbers as they are read.

use crate::disk::safetensors::{SafetensorsFile, decode, number_type};
use crate::error::{Error, Result};
use crate::execution::initial_values::InitialValues;
use candle_core::quantized::{GgmlDType, QStorage, QTensor, gguf_file};
use candle_core::{DType, Device};
use serde_json::Value;
use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// How elements lie in a file.
#[derive(Debug, Clone, Copy)]
enum Encoding {
    Plain(DType),
    Blocks(GgmlDType),
}

impl Encoding {
    /// Elements of a block, and its bytes.
    fn block(self) -> (usize, usize) {
        match self {
            Self::Plain(dtype) => (1, dtype.size_in_bytes()),
            Self::Blocks(dtype) => (dtype.block_size(), dtype.type_size()),
        }
    }
}

/// How a parameter's elements are arranged in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ElementOrder {
    /// As in the parameter.
    Same,
    /// A matrix lies in the file as its transpose.
    Transposed,
    /// In each head of so many rows, the first and second half of rows lie in turns.
    InterleavedHeads {
        /// Rows of a head.
        head_rows: usize,
    },
}

/// A tensor in a file.
#[derive(Debug)]
struct StoredTensor {
    path: Arc<Path>,
    file: Arc<File>,
    start_byte: u64,
    shape: Vec<usize>,
    encoding: Encoding,
    order: ElementOrder,
}

/// Elements that are read and decoded at a time: what a read needs beside its target stays below a few MiB.
const READ_ELEMENTS: usize = 256 * 1024;

impl StoredTensor {
    fn damaged(&self, reason: String) -> Error {
        Error::Weights { path: self.path.to_path_buf(), reason }
    }

    /// Reads elements from `first` of the tensor as it lies in the file.
    fn read(&self, name: &str, first: usize, out: &mut [f32]) -> Result<()> {
        let (block_elements, block_bytes) = self.encoding.block();
        let mut first = first;
        for part in out.chunks_mut(READ_ELEMENTS) {
            let first_block = first / block_elements;
            let blocks = (first + part.len()).div_ceil(block_elements) - first_block;
            let mut bytes = vec![0; blocks * block_bytes];
            let start = self.start_byte + (first_block * block_bytes) as u64;
            self.file.read_exact_at(&mut bytes, start).map_err(|source| {
                self.damaged(format!("{name} could not be read at byte {start}: {source}"))
            })?;
            let skipped = first - first_block * block_elements;
            match self.encoding {
                Encoding::Plain(dtype) => decode(dtype, &bytes, part),
                Encoding::Blocks(dtype) => {
                    let elements = blocks * block_elements;
                    let decoded = QStorage::from_data(Cow::Owned(bytes), &Device::Cpu, dtype)
                        .and_then(|storage| QTensor::new(storage, elements)?.dequantize(&Device::Cpu))
                        .and_then(|tensor| tensor.to_vec1::<f32>())
                        .map_err(|error| self.damaged(format!("{name} could not be decoded: {error}")))?;
                    part.copy_from_slice(&decoded[skipped..skipped + part.len()]);
                }
            }
            first += part.len();
        }
        Ok(())
    }

    /// Fills `out` with elements from `first` of the columns `columns` of the parameter, row by row.
    fn fill(&self, name: &str, columns: Range<usize>, first: usize, out: &mut [f32]) -> Result<()> {
        let (count, width) = (columns.len(), self.width());
        match self.order {
            ElementOrder::Same if count == width => self.read(name, first, out),
            ElementOrder::Same => self.fill_rows(name, columns, first, out, |row| row),
            ElementOrder::InterleavedHeads { head_rows } => {
                self.fill_rows(name, columns, first, out, |row| {
                    let (head, within, half) = (row / head_rows, row % head_rows, head_rows / 2);
                    head * head_rows + 2 * (within % half) + within / half
                })
            }
            ElementOrder::Transposed => {
                // A column of the parameter is a row of the file.
                let rows = self.shape.last().copied().unwrap_or(1);
                let (first_row, last) = (first / count, (first + out.len()).div_ceil(count));
                let mut part = vec![0.0; last - first_row];
                for column in columns.clone() {
                    self.read(name, column * rows + first_row, &mut part)?;
                    for (row, &value) in (first_row..).zip(&part) {
                        if let Some(place) = (row * count + column - columns.start).checked_sub(first)
                            && let Some(target) = out.get_mut(place)
                        {
                            *target = value;
                        }
                    }
                }
                Ok(())
            }
        }
    }

    /// As [`Self::fill`], row by row, of which `stored` says the number in the file.
    fn fill_rows(
        &self,
        name: &str,
        columns: Range<usize>,
        first: usize,
        out: &mut [f32],
        stored: impl Fn(usize) -> usize,
    ) -> Result<()> {
        let (count, width) = (columns.len(), self.width());
        let mut done = 0;
        while done < out.len() {
            let (row, column) = ((first + done) / count, (first + done) % count);
            let part = (count - column).min(out.len() - done);
            let place = stored(row) * width + columns.start + column;
            self.read(name, place, &mut out[done..done + part])?;
            done += part;
        }
        Ok(())
    }

    /// Elements of a row of the parameter; a vector is one row.
    fn width(&self) -> usize {
        self.parameter_shape().last().copied().unwrap_or(1).max(1)
    }

    /// Shape of the parameter.
    fn parameter_shape(&self) -> Vec<usize> {
        match self.order {
            ElementOrder::Transposed => self.shape.iter().rev().copied().collect(),
            _ => self.shape.clone(),
        }
    }
}

/// What a model's parameters are called in a file, and how they lie there; none: the tensor is no parameter.
pub type Naming<'a> = dyn Fn(&str) -> Option<(String, ElementOrder)> + 'a;

/// What a parameter is called in a file, if it has a name there.
pub type StoredName = fn(&str) -> Option<String>;

/// The weights of a folder or file.
#[derive(Debug)]
pub struct Weights {
    /// Folder or file, for messages.
    source: PathBuf,
    /// Where names in the file are others, for messages.
    stored_name: Option<StoredName>,
    /// Which parameters the model has beside those of the file, if any.
    own: Option<fn(&str) -> bool>,
    tensors: HashMap<String, StoredTensor>,
}

impl Weights {
    /// Opens the safetensors files of a Hugging Face folder: those of its index, or `model.safetensors`.
    ///
    /// # Errors
    /// [`Error::File`], and [`Error::Weights`] for damaged files and tensors that cannot be read as numbers.
    pub fn from_folder(folder: &Path, naming: &Naming) -> Result<Self> {
        let mut tensors = HashMap::new();
        for path in files_of(folder)? {
            let file = SafetensorsFile::open(&path)?;
            let shared: Arc<Path> = path.as_path().into();
            let handle = Arc::new(file.file);
            for (stored, info) in &file.tensors {
                let Some((name, order)) = naming(stored) else { continue };
                let Some(dtype) = number_type(info.dtype) else {
                    let reason =
                        format!("{stored} is of type {:?}; F32, BF16 and F16 can be read", info.dtype);
                    return Err(Error::Weights { path, reason });
                };
                let tensor = StoredTensor {
                    path: shared.clone(),
                    file: handle.clone(),
                    start_byte: file.data_start + info.data_offsets.0 as u64,
                    shape: info.shape.clone(),
                    encoding: Encoding::Plain(dtype),
                    order,
                };
                tensors.insert(name, tensor);
            }
        }
        Ok(Self { source: folder.to_owned(), stored_name: None, own: None, tensors })
    }

    /// Opens a GGUF file, of which `content` is the table of contents, and `stored_name` says for messages
    /// what `naming` says the other way round.
    ///
    /// # Errors
    /// [`Error::File`], and [`Error::Weights`] if it is shorter than its table says.
    pub fn from_gguf(
        path: &Path,
        content: &gguf_file::Content,
        naming: &Naming,
        stored_name: StoredName,
    ) -> Result<Self> {
        let failed = Error::file(path);
        let file = Arc::new(File::open(path).map_err(failed)?);
        let file_bytes = file.metadata().map_err(failed)?.len();
        let shared: Arc<Path> = path.into();
        let mut tensors = HashMap::new();
        // In the order of the file, so that of a file that was cut short the first tensor that is lost is
        // named.
        let mut infos: Vec<_> = content.tensor_infos.iter().collect();
        infos.sort_by_key(|(stored, info)| (info.offset, *stored));
        for (stored, info) in infos {
            let damaged = |reason: String| Error::Weights { path: path.to_owned(), reason };
            let Some((name, order)) = naming(stored) else { continue };
            let encoding = match info.ggml_dtype {
                GgmlDType::F32 => Encoding::Plain(DType::F32),
                GgmlDType::F16 => Encoding::Plain(DType::F16),
                GgmlDType::BF16 => Encoding::Plain(DType::BF16),
                blocks => Encoding::Blocks(blocks),
            };
            let (block_elements, block_bytes) = encoding.block();
            let elements = info.shape.dims().iter().try_fold(1_usize, |all, &size| all.checked_mul(size));
            let blocks = elements.filter(|elements| elements.is_multiple_of(block_elements));
            let bytes = blocks.and_then(|elements| (elements / block_elements).checked_mul(block_bytes));
            let start_byte = content.tensor_data_offset.checked_add(info.offset);
            let place = start_byte.zip(bytes).and_then(|(start_byte, bytes)| {
                Some((start_byte, start_byte.checked_add(u64::try_from(bytes).ok()?)?))
            });
            let Some((start_byte, end_byte)) = place else {
                let (shape, dtype) = (&info.shape, info.ggml_dtype);
                return Err(damaged(format!(
                    "{stored} of shape {shape:?} cannot be of type {dtype:?} where it is"
                )));
            };
            if end_byte > file_bytes {
                return Err(damaged(format!(
                    "it has {file_bytes} bytes and {end_byte} are needed for {stored}: it was cut short"
                )));
            }
            let tensor = StoredTensor {
                path: shared.clone(),
                file: file.clone(),
                start_byte,
                shape: info.shape.dims().to_vec(),
                encoding,
                order,
            };
            if tensors.insert(name.clone(), tensor).is_some() {
                return Err(damaged(format!("{stored} is {name}, which it has already by another name")));
            }
        }
        Ok(Self { source: path.to_owned(), stored_name: Some(stored_name), own: None, tensors })
    }

    /// The same weights for a model that has parameters of its own beside them, those of whose names `own`
    /// holds: they start with random numbers.
    pub fn with_own_parameters(self, own: fn(&str) -> bool) -> Self {
        Self { own: Some(own), ..self }
    }

    /// A parameter's name, with the one in the file where it is another.
    fn called(&self, name: &str) -> String {
        match self.stored_name.and_then(|stored_name| stored_name(name)) {
            Some(stored) => format!("{name} (in the file {stored})"),
            None => name.to_owned(),
        }
    }

    /// Shape of the parameter of a name, if it is there.
    pub fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.tensors.get(name).map(StoredTensor::parameter_shape)
    }
}

/// The safetensors files of a folder.
fn files_of(folder: &Path) -> Result<Vec<PathBuf>> {
    let index = folder.join("model.safetensors.index.json");
    if !index.exists() {
        return Ok(vec![folder.join("model.safetensors")]);
    }
    let wrong = |reason: String| Error::Weights { path: index.clone(), reason };
    let text = std::fs::read_to_string(&index).map_err(Error::file(&index))?;
    let value: Value =
        serde_json::from_str(&text).map_err(|error| wrong(format!("it is not valid JSON: {error}")))?;
    let map = value.get("weight_map").and_then(Value::as_object);
    let map = map.ok_or_else(|| wrong("it has no weight_map".into()))?;
    let names: Option<HashSet<&str>> = map.values().map(Value::as_str).collect();
    let names = names.ok_or_else(|| wrong("its weight_map names something that is no file".into()))?;
    // A name is that of a file beside the index: nothing else on this machine is read by what a download
    // says.
    if let Some(name) = names.iter().find(|name| name.contains(['/', '\\'])) {
        return Err(wrong(format!("its weight_map names {name}, which is not in its folder")));
    }
    let mut files: Vec<PathBuf> = names.into_iter().map(|name| folder.join(name)).collect();
    files.sort();
    Ok(files)
}

impl InitialValues for Weights {
    fn check(&self, parameters: &[(String, Vec<usize>)]) -> Result<()> {
        let wrong = |reason: String| Err(Error::Weights { path: self.source.clone(), reason });
        for (name, shape) in parameters {
            match self.tensors.get(name) {
                Some(tensor) if tensor.parameter_shape() == *shape => {}
                Some(tensor) => {
                    let found = tensor.parameter_shape();
                    let name = self.called(name);
                    let reason =
                        format!("{name} has the shape {found:?}, and the configuration says {shape:?}");
                    return Err(tensor.damaged(reason));
                }
                None if self.own.is_some_and(|own| own(name)) => {}
                None => {
                    let name = self.called(name);
                    return wrong(format!("it has no {name}, which the model of its configuration has"));
                }
            }
        }
        let asked: HashSet<&String> = parameters.iter().map(|(name, _)| name).collect();
        match self.tensors.keys().filter(|name| !asked.contains(name)).min() {
            Some(name) => {
                wrong(format!("it has {}, which the model of its configuration has not", self.called(name)))
            }
            None => Ok(()),
        }
    }

    fn fill(&self, name: &str, first_element: usize, out: &mut [f32]) -> Result<bool> {
        match self.tensors.get(name) {
            Some(tensor) => tensor.fill(name, 0..tensor.width(), first_element, out).map(|()| true),
            None => Ok(false),
        }
    }

    fn fill_columns(
        &self,
        name: &str,
        columns: Range<usize>,
        _: usize,
        first_element: usize,
        out: &mut [f32],
    ) -> Result<bool> {
        match self.tensors.get(name) {
            Some(tensor) => tensor.fill(name, columns, first_element, out).map(|()| true),
            None => Ok(false),
        }
    }
}
