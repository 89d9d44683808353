//! Text for training: where it comes from, how it becomes tokens, and which tokens a step sees. Neither text
//! nor tokens are ever in memory as a whole: text goes by documents, and tokens lie in a file.

use crate::data::error::DataError;
use crate::data::tokenizer::Tokenizer;
use candle_core::{Device, Tensor};
use ferrozero_kernels::philox::Stream;
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::{BufWriter, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Files above this are not prose and not source.
const LARGEST_FILE_BYTES: u64 = 1 << 20;
/// A file given on its own is cut into documents of about this size, at ends of lines.
const DOCUMENT_BYTES: usize = 1 << 20;
/// Bytes of a token in the file of tokens.
const TOKEN_BYTES: u64 = 4;
/// What the default corpus stops at.
const DEFAULT_CORPUS_BYTES: usize = 32 << 20;
/// Of how many tokens one is kept for validation.
const VALIDATION_SHARE: usize = 50;
/// The data is cut into this many parts, or fewer if it is short, and the end of each is kept for validation:
/// what is validated is then of all kinds that there are.
const PARTS: usize = 64;

/// Text, document by document.
pub struct Corpus {
    files: Vec<PathBuf>,
    /// Whether there is one file, which is text whatever it holds and however large it is.
    single: bool,
    limit_bytes: usize,
    /// Where it is from, for people.
    pub source: String,
}

impl Corpus {
    /// The sources and documents of the packages that cargo has fetched: every machine that built this
    /// program has them.
    ///
    /// # Errors
    /// [`DataError::Empty`] if there are none.
    pub fn from_cargo_registry() -> Result<Self, DataError> {
        let home = std::env::var_os("CARGO_HOME").map(PathBuf::from);
        let home = home.or_else(|| std::env::home_dir().map(|home| home.join(".cargo"))).unwrap_or_default();
        let folder = home.join("registry").join("src");
        let mut files = vec![];
        // Order and choice must not depend on the host of the registry, only on the packages.
        for registry in sorted_entries(&folder).unwrap_or_default() {
            list_files(&registry, &mut files)?;
        }
        files.retain(|path| path.extension().is_some_and(|extension| extension == "rs" || extension == "md"));
        if files.is_empty() {
            return Err(DataError::Empty { place: folder.display().to_string() });
        }
        let source = "the sources and documents of cargo's packages".to_owned();
        Ok(Self { files, single: false, limit_bytes: DEFAULT_CORPUS_BYTES, source })
    }

    /// The text of a file, or of all text files in a folder and below.
    ///
    /// # Errors
    /// [`DataError::Unreadable`].
    pub fn from_path(path: &Path) -> Result<Self, DataError> {
        let unreadable = |source| DataError::Unreadable { path: path.to_owned(), source };
        let single = !path.metadata().map_err(unreadable)?.is_dir();
        let mut files = vec![];
        if single {
            files.push(path.to_owned());
        } else {
            list_files(path, &mut files)?;
        }
        Ok(Self { files, single, limit_bytes: usize::MAX, source: path.display().to_string() })
    }

    /// Hands every document to `each`. Those of different files end with a zero byte.
    ///
    /// # Errors
    /// [`DataError::Unreadable`], [`DataError::Empty`], and what `each` answers.
    pub fn documents(&self, mut each: impl FnMut(&[u8]) -> Result<(), DataError>) -> Result<(), DataError> {
        let mut left_bytes = self.limit_bytes;
        let mut document = vec![];
        for path in &self.files {
            if self.single {
                read_in_documents(path, |document| {
                    left_bytes -= document.len();
                    each(document)
                })?;
                continue;
            }
            if left_bytes == 0 {
                break;
            }
            document.clear();
            append_text(path, &mut document)?;
            document.truncate(left_bytes);
            left_bytes -= document.len();
            if !document.is_empty() {
                each(&document)?;
            }
        }
        if left_bytes == self.limit_bytes {
            return Err(DataError::Empty { place: self.source.clone() });
        }
        Ok(())
    }
}

/// Reads a file of any size in documents that end where lines do.
fn read_in_documents(
    path: &Path,
    mut each: impl FnMut(&[u8]) -> Result<(), DataError>,
) -> Result<(), DataError> {
    let unreadable = |source| DataError::Unreadable { path: path.to_owned(), source };
    let mut file = File::open(path).map_err(unreadable)?;
    let mut rest = vec![];
    loop {
        let wanted = DOCUMENT_BYTES as u64;
        let read_bytes = (&mut file).take(wanted).read_to_end(&mut rest).map_err(unreadable)?;
        let at_end = (read_bytes as u64) < wanted;
        let last_line = rest.iter().rposition(|&byte| byte == b'\n').map_or(rest.len(), |end| end + 1);
        let cut = if at_end { rest.len() } else { last_line };
        if cut > 0 {
            each(&rest[..cut])?;
        }
        rest.drain(..cut);
        if at_end {
            return Ok(());
        }
    }
}

fn sorted_entries(folder: &Path) -> std::io::Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(folder)?;
    let mut paths =
        entries.map(|entry| entry.map(|entry| entry.path())).collect::<std::io::Result<Vec<_>>>()?;
    paths.sort();
    Ok(paths)
}

/// All files below a folder in the order of their names. Hidden ones and links are left out.
fn list_files(folder: &Path, files: &mut Vec<PathBuf>) -> Result<(), DataError> {
    let unreadable = |source| DataError::Unreadable { path: folder.to_owned(), source };
    for path in sorted_entries(folder).map_err(unreadable)? {
        let hidden = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'));
        let Ok(metadata) = path.symlink_metadata() else { continue };
        if !hidden && metadata.is_dir() {
            list_files(&path, files)?;
        } else if !hidden && metadata.is_file() {
            files.push(path);
        }
    }
    Ok(())
}

/// Appends a file if it is text of an ordinary size.
fn append_text(path: &Path, text: &mut Vec<u8>) -> Result<(), DataError> {
    let unreadable = |source| DataError::Unreadable { path: path.to_owned(), source };
    let mut bytes = vec![];
    let file = std::fs::File::open(path).map_err(unreadable)?;
    file.take(LARGEST_FILE_BYTES + 1).read_to_end(&mut bytes).map_err(unreadable)?;
    let is_text = !bytes.is_empty() && !bytes.contains(&0) && std::str::from_utf8(&bytes).is_ok();
    if bytes.len() as u64 <= LARGEST_FILE_BYTES && is_text {
        text.extend(bytes);
        text.push(0);
    }
    Ok(())
}

/// Inputs and targets of a micro-batch, both [batch, sequence].
pub struct Batch {
    /// Tokens.
    pub inputs: Tensor,
    /// The token after each.
    pub targets: Tensor,
}

/// A file of tokens that no folder lists, so that nothing is left of it when it is closed, however that
/// happens.
pub struct TokenFile {
    file: File,
    /// Folder of the run, for messages.
    folder: PathBuf,
    pub(crate) tokens: usize,
    pub(crate) fingerprint: String,
}

impl TokenFile {
    /// Encodes a corpus. The file is on the file system of `folder`, or of the folder above it that exists.
    ///
    /// # Errors
    /// [`DataError`].
    pub fn encode(corpus: &Corpus, tokenizer: &Tokenizer, folder: &Path) -> Result<Self, DataError> {
        let mut writer = TokenWriter::new(folder)?;
        corpus.documents(|document| writer.append(&tokenizer.encode(document)?))?;
        writer.finish()
    }

    /// Tokens from `start`.
    ///
    /// # Errors
    /// [`DataError::Tokens`].
    pub(crate) fn read(&self, start: usize, count: usize) -> Result<Vec<u32>, DataError> {
        let mut bytes = vec![0; count * TOKEN_BYTES as usize];
        let read = self.file.read_exact_at(&mut bytes, start as u64 * TOKEN_BYTES);
        read.map_err(|source| tokens_error(&self.folder, "read", self.tokens, source))?;
        let words = bytes.chunks_exact(TOKEN_BYTES as usize);
        Ok(words.map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]])).collect())
    }
}

fn tokens_error(folder: &Path, operation: &'static str, tokens: usize, source: std::io::Error) -> DataError {
    DataError::Tokens { path: folder.to_owned(), operation, bytes: tokens as u64 * TOKEN_BYTES, source }
}

pub(crate) struct TokenWriter {
    file: BufWriter<File>,
    folder: PathBuf,
    hasher: Sha256,
    tokens: usize,
}

impl TokenWriter {
    pub(crate) fn new(folder: &Path) -> Result<Self, DataError> {
        let absolute = std::path::absolute(folder).unwrap_or_else(|_| folder.to_owned());
        let existing = absolute.ancestors().find(|folder| folder.is_dir()).unwrap_or(Path::new("/"));
        let file =
            tempfile::tempfile_in(existing).map_err(|source| tokens_error(folder, "made", 0, source))?;
        let folder = folder.to_owned();
        Ok(Self { file: BufWriter::new(file), folder, hasher: Sha256::new(), tokens: 0 })
    }

    pub(crate) fn append(&mut self, tokens: &[u32]) -> Result<(), DataError> {
        self.tokens += tokens.len();
        for token in tokens {
            let bytes = token.to_le_bytes();
            self.hasher.update(bytes);
            let written = self.file.write_all(&bytes);
            written.map_err(|source| tokens_error(&self.folder, "written", self.tokens, source))?;
        }
        Ok(())
    }

    pub(crate) fn finish(self) -> Result<TokenFile, DataError> {
        let Self { file, folder, hasher, tokens } = self;
        let file = file
            .into_inner()
            .map_err(|error| tokens_error(&folder, "written", tokens, error.into_error()))?;
        let fingerprint = hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(TokenFile { file, folder, tokens, fingerprint })
    }
}

/// Tokens for training and validation. What a step sees is a function of seed and step alone, so that a
/// resumed run needs nothing else to go on.
pub struct Dataset {
    tokens: TokenFile,
    parts: usize,
    /// Tokens of each part, those for validation included.
    part_tokens: usize,
    /// Tokens at the end of each part that are kept for validation.
    validation_tokens: usize,
    windows: Stream,
    batch: usize,
    sequence: usize,
}

impl Dataset {
    /// Splits tokens into those for training and those for validation.
    ///
    /// # Errors
    /// [`DataError::TooSmall`].
    pub fn new(tokens: TokenFile, seed: u64, batch: usize, sequence: usize) -> Result<Self, DataError> {
        let window = sequence + 1;
        let needed = 2 * window;
        if tokens.tokens < needed {
            return Err(DataError::TooSmall { tokens: tokens.tokens, needed });
        }
        let parts = (tokens.tokens / (VALIDATION_SHARE * window)).clamp(1, PARTS);
        let part_tokens = tokens.tokens / parts;
        let validation_tokens = (part_tokens / VALIDATION_SHARE).max(window).min(part_tokens - window);
        let windows = Stream::new(seed, "training windows");
        Ok(Self { tokens, parts, part_tokens, validation_tokens, windows, batch, sequence })
    }

    /// SHA-256 of all tokens.
    pub fn fingerprint(&self) -> &str {
        &self.tokens.fingerprint
    }

    /// Number of tokens.
    pub fn len(&self) -> usize {
        self.tokens.tokens
    }

    /// Whether there are no tokens.
    pub fn is_empty(&self) -> bool {
        self.tokens.tokens == 0
    }

    /// Random windows of the tokens for training.
    ///
    /// # Errors
    /// What candle says.
    pub fn train_batch(
        &self,
        step: u64,
        micro_batch: usize,
        micro_batches: usize,
    ) -> candle_core::Result<Batch> {
        let starts = self.part_tokens - self.validation_tokens - self.sequence;
        let first = (step * micro_batches as u64 + micro_batch as u64) * self.batch as u64;
        self.batch_at((first..first + self.batch as u64).map(|row| {
            let number = (self.windows.integer(row) % (self.parts * starts) as u64) as usize;
            number / starts * self.part_tokens + number % starts
        }))
    }

    /// Evenly spread windows of the tokens for validation: the same in every evaluation.
    ///
    /// # Errors
    /// What candle says.
    pub fn validation_batch(&self, number: usize, numbers: usize) -> candle_core::Result<Batch> {
        let starts = self.validation_tokens - self.sequence;
        let rows = (numbers * self.batch).div_ceil(self.parts);
        self.batch_at((0..self.batch).map(|row| {
            let row = number * self.batch + row;
            let end = (row % self.parts + 1) * self.part_tokens;
            end - self.validation_tokens + row / self.parts * starts / rows
        }))
    }

    fn batch_at(&self, starts: impl Iterator<Item = usize>) -> candle_core::Result<Batch> {
        let (mut inputs, mut targets) = (vec![], vec![]);
        for start in starts {
            let window = self.tokens.read(start, self.sequence + 1).map_err(candle_core::Error::wrap)?;
            inputs.extend_from_slice(&window[..self.sequence]);
            targets.extend_from_slice(&window[1..]);
        }
        let shape = (self.batch, self.sequence);
        Ok(Batch {
            inputs: Tensor::from_vec(inputs, shape, &Device::Cpu)?,
            targets: Tensor::from_vec(targets, shape, &Device::Cpu)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dataset(tokens: u32, seed: u64, batch: usize, sequence: usize) -> Result<Dataset, DataError> {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = TokenWriter::new(folder.path())?;
        writer.append(&(0..tokens).collect::<Vec<_>>())?;
        Dataset::new(writer.finish()?, seed, batch, sequence)
    }

    fn text(path: &Path) -> Result<Vec<u8>, DataError> {
        let mut text = vec![];
        Corpus::from_path(path)?.documents(|document| {
            text.extend_from_slice(document);
            Ok(())
        })?;
        Ok(text)
    }

    fn rows(tensor: &Tensor) -> Vec<Vec<u32>> {
        tensor.to_vec2().unwrap()
    }

    #[test]
    fn batches_are_a_function_of_step_and_training_never_sees_what_is_validated() {
        for tokens in [1000, 10_000] {
            let data = dataset(tokens, 3, 4, 16).unwrap();
            let is_validation = |token: u32| {
                let place = token as usize;
                place % data.part_tokens >= data.part_tokens - data.validation_tokens
            };
            for step in 0..200 {
                let batch = data.train_batch(step, 0, 1).unwrap();
                for (inputs, targets) in rows(&batch.inputs).iter().zip(rows(&batch.targets)) {
                    assert!(inputs.iter().zip(&targets).all(|(input, target)| target - input == 1));
                    assert!(!is_validation(inputs[0]) && !is_validation(targets[15]));
                }
                assert_eq!(rows(&data.train_batch(step, 0, 1).unwrap().inputs), rows(&batch.inputs));
            }
            let micro_batches: Vec<_> =
                (0..2).map(|m| rows(&data.train_batch(5, m, 2).unwrap().inputs)).collect();
            assert_ne!(micro_batches[0], micro_batches[1]);
            let mut parts = std::collections::BTreeSet::new();
            for number in 0..3 {
                let batch = data.validation_batch(number, 3).unwrap();
                for (inputs, targets) in rows(&batch.inputs).iter().zip(rows(&batch.targets)) {
                    assert!(is_validation(inputs[0]) && is_validation(targets[15]));
                    parts.insert(inputs[0] as usize / data.part_tokens);
                }
            }
            assert_eq!(parts.len(), data.parts.min(12), "of all parts");
        }
    }

    #[test]
    fn the_smallest_data_works_and_smaller_data_is_refused() {
        let data = dataset(34, 0, 2, 16).unwrap();
        data.train_batch(0, 0, 1).unwrap();
        data.validation_batch(0, 1).unwrap();
        assert!(matches!(dataset(33, 0, 2, 16), Err(DataError::TooSmall { needed: 34, .. })));
    }

    #[test]
    fn folders_are_read_in_order_and_without_what_is_not_text() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("b")).unwrap();
        std::fs::write(folder.path().join("b/one.txt"), "one").unwrap();
        std::fs::write(folder.path().join("a.txt"), "first").unwrap();
        std::fs::write(folder.path().join("c.bin"), [0, 159, 146]).unwrap();
        assert_eq!(text(folder.path()).unwrap(), b"first\0one\0");
        assert_eq!(text(&folder.path().join("a.txt")).unwrap(), b"first");
        let empty = tempfile::tempdir().unwrap();
        assert!(matches!(text(empty.path()), Err(DataError::Empty { .. })));
        assert!(matches!(text(&empty.path().join("x")), Err(DataError::Unreadable { .. })));
    }

    #[test]
    fn a_large_file_comes_in_documents_that_end_where_lines_do() {
        let folder = tempfile::tempdir().unwrap();
        let line = b"All work and no play makes Jack a dull boy.\n";
        let whole = line.repeat(3 * DOCUMENT_BYTES / line.len());
        for text in [whole.clone(), vec![b'x'; 2 * DOCUMENT_BYTES + 5], whole[..DOCUMENT_BYTES].to_vec()] {
            let path = folder.path().join("text");
            std::fs::write(&path, &text).unwrap();
            let mut documents: Vec<Vec<u8>> = vec![];
            let corpus = Corpus::from_path(&path).unwrap();
            let keep = |document: &[u8]| {
                documents.push(document.to_vec());
                Ok(())
            };
            corpus.documents(keep).unwrap();
            assert_eq!(documents.concat(), text);
            assert!(documents.len() > 1 || text.len() <= DOCUMENT_BYTES);
            if text.ends_with(b"\n") {
                assert!(documents.iter().all(|document| document.ends_with(b"\n")));
            }
        }
    }

    #[test]
    fn bytes_come_back_as_they_were() {
        let text = "größer als Speicher";
        let tokens = Tokenizer::Bytes.encode(text.as_bytes()).unwrap();
        assert_eq!(Tokenizer::Bytes.decode(&tokens), text);
        assert!(Tokenizer::from_file(Path::new("nowhere/tokenizer.json")).is_err());
    }
}
