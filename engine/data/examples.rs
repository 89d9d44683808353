//! Examples for fine-tuning: prompts with answers, or texts, packed into sequences of one length. What is not
//! to be learnt, such as prompts, is seen and not counted.

use crate::data::chat::{ChatTemplate, TextPart};
use crate::data::corpus::{TokenFile, TokenWriter};
use crate::data::error::DataError;
use crate::data::tokenizer::Tokenizer;
use candle_core::{Device, Tensor};
use ferrozero_kernels::philox::Stream;
use serde_json::Value;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

/// Set in a token that is to be learnt. No vocabulary is so large.
const COUNTED: u32 = 1 << 31;
/// Of how many sequences one is kept for validation.
const VALIDATION_SHARE: usize = 20;

/// Sequences of a micro-batch.
pub struct Packed {
    /// Tokens [batch, sequence].
    pub inputs: Tensor,
    /// The token after each.
    pub targets: Tensor,
    /// Places among all targets that are to be learnt `[N]`.
    pub counted: Tensor,
}

/// Examples as sequences of tokens, in a file.
pub struct Examples {
    tokens: TokenFile,
    /// First tokens of the sequences that have something to learn.
    starts: Vec<usize>,
    validation: usize,
    order: Stream,
    batch: usize,
    sequence: usize,
}

impl Examples {
    /// Reads a text file, or for `*.jsonl` one object a line: `{"prompt": …, "completion": …}`,
    /// `{"text": …}`, or `{"messages": […]}`, which is written as `chat` says. What the tokenizer puts before
    /// a text is before each example and `end` behind it, but for messages, whose template writes both.
    /// `folder` is that of the run.
    ///
    /// # Errors
    /// [`DataError`], with the line for one that is no example.
    pub fn read(
        path: &Path,
        tokenizer: &Tokenizer,
        (end, chat): (Option<u32>, Option<&ChatTemplate>),
        folder: &Path,
        (seed, batch, sequence): (u64, usize, usize),
    ) -> Result<Self, DataError> {
        let unreadable = |source| DataError::Unreadable { path: path.to_owned(), source };
        let mut writer = TokenWriter::new(folder)?;
        let prefix = tokenizer.prefix()?;
        let mut append = |parts: &[TextPart], is_chat: bool| {
            let (prefix, end) = if is_chat { (&[][..], None) } else { (&prefix[..], end) };
            let mut tokens = prefix.to_vec();
            tokens.extend(marked_tokens(tokenizer, parts)?);
            tokens.extend(end.map(|token| token | COUNTED));
            writer.append(&tokens)
        };
        if path.extension().is_some_and(|extension| extension == "jsonl") {
            let file = BufReader::new(File::open(path).map_err(unreadable)?);
            for (number, line) in file.lines().enumerate() {
                let line = line.map_err(unreadable)?;
                if line.trim().is_empty() {
                    continue;
                }
                let wrong = |reason| DataError::Example { path: path.to_owned(), line: number + 1, reason };
                let value: Value = serde_json::from_str(&line).map_err(|error| wrong(error.to_string()))?;
                let (parts, is_chat) = parts_of(&value, chat).map_err(wrong)?;
                append(&parts, is_chat)?;
            }
        } else {
            crate::data::corpus::Corpus::from_path(path)?.documents(|document| {
                append(&[(String::from_utf8_lossy(document).into_owned(), true)], false)
            })?;
        }
        Self::pack(writer.finish()?, (seed, batch, sequence))
    }

    fn pack(tokens: TokenFile, (seed, batch, sequence): (u64, usize, usize)) -> Result<Self, DataError> {
        let mut starts = vec![];
        for start in (0..tokens.tokens.saturating_sub(sequence)).step_by(sequence) {
            if tokens.read(start + 1, sequence)?.iter().any(|token| token & COUNTED != 0) {
                starts.push(start);
            }
        }
        if starts.len() < 2 {
            return Err(DataError::TooSmall { tokens: tokens.tokens, needed: 2 * sequence + 1 });
        }
        let validation = (starts.len() / VALIDATION_SHARE).max(1);
        let order = Stream::new(seed, "order of examples");
        // Which sequences are for validation must not depend on where in the file they are.
        shuffle(&mut starts, &order, 0);
        Ok(Self { tokens, starts, validation, order, batch, sequence })
    }

    /// SHA-256 of all tokens.
    pub fn fingerprint(&self) -> &str {
        &self.tokens.fingerprint
    }

    /// Sequences for training.
    pub fn training(&self) -> usize {
        self.starts.len() - self.validation
    }

    /// Batches of an evaluation.
    pub fn validation_batches(&self) -> usize {
        self.validation.div_ceil(self.batch)
    }

    /// Micro-batch `number` since the beginning: every sequence once an epoch, in an order that is the
    /// epoch's own.
    ///
    /// # Errors
    /// What candle says.
    pub fn train_batch(&self, number: u64) -> candle_core::Result<Packed> {
        let count = self.training() as u64;
        let mut rows = vec![];
        let mut epoch_order: Option<(u64, Vec<usize>)> = None;
        for row in number * self.batch as u64..(number + 1) * self.batch as u64 {
            let epoch = row / count + 1;
            if epoch_order.as_ref().is_none_or(|(of, _)| *of != epoch) {
                let mut order = self.starts[self.validation..].to_vec();
                shuffle(&mut order, &self.order, epoch);
                epoch_order = Some((epoch, order));
            }
            rows.extend(epoch_order.as_ref().map(|(_, order)| order[(row % count) as usize]));
        }
        self.at(&rows)
    }

    /// A batch of the sequences for validation; the last one goes on with the first.
    ///
    /// # Errors
    /// What candle says.
    pub fn validation_batch(&self, number: usize) -> candle_core::Result<Packed> {
        let rows: Vec<usize> =
            (0..self.batch).map(|row| self.starts[(number * self.batch + row) % self.validation]).collect();
        self.at(&rows)
    }

    fn at(&self, starts: &[usize]) -> candle_core::Result<Packed> {
        let (mut inputs, mut targets, mut counted) = (vec![], vec![], vec![]);
        for &start in starts {
            let window = self.tokens.read(start, self.sequence + 1).map_err(candle_core::Error::wrap)?;
            inputs.extend(window[..self.sequence].iter().map(|token| token & !COUNTED));
            for token in &window[1..] {
                if token & COUNTED != 0 {
                    counted.push(targets.len() as u32);
                }
                targets.push(token & !COUNTED);
            }
        }
        let shape = (starts.len(), self.sequence);
        Ok(Packed {
            inputs: Tensor::from_vec(inputs, shape, &Device::Cpu)?,
            targets: Tensor::from_vec(targets, shape, &Device::Cpu)?,
            counted: Tensor::new(counted, &Device::Cpu)?,
        })
    }
}

/// Tokens of the text that the parts are together, cut as the model will see it cut: what a tokenizer makes
/// of a text depends on what is before and behind it. Those that stand for something of a part that is to be
/// learnt are marked, as transformers' masks of the assistant's tokens are made; of a token over the border
/// of two parts, the whole is learnt.
fn marked_tokens(tokenizer: &Tokenizer, parts: &[TextPart]) -> Result<Vec<u32>, DataError> {
    let mut text = String::new();
    let mut learnt = vec![];
    for (part, is_learnt) in parts {
        let first = text.len();
        text.push_str(part);
        learnt.extend((*is_learnt && !part.is_empty()).then_some(first..text.len()));
    }
    let marked = tokenizer.encode_with_places(&text)?.into_iter().map(|(token, place)| {
        // A token that stands for nothing is that of the character which follows it.
        let end = place.end.max(place.start + 1);
        let is_learnt = learnt.iter().any(|part| place.start < part.end && part.start < end);
        if is_learnt { token | COUNTED } else { token }
    });
    Ok(marked.collect())
}

/// The parts of an example, and whether it is a chat.
fn parts_of(value: &Value, chat: Option<&ChatTemplate>) -> Result<(Vec<TextPart>, bool), String> {
    let text = |key: &str| value.get(key).and_then(Value::as_str).map(str::to_owned);
    let messages = value.get("messages").and_then(Value::as_array);
    match (text("prompt"), text("completion"), text("text"), messages) {
        (Some(prompt), Some(completion), None, None) => {
            Ok((vec![(prompt, false), (completion, true)], false))
        }
        (None, None, Some(text), None) => Ok((vec![(text, true)], false)),
        (None, None, None, Some(messages)) => {
            let chat = chat.ok_or("the model has no chat template, which messages need")?;
            Ok((chat.parts(messages)?, true))
        }
        _ => {
            Err("expected an object with \"prompt\" and \"completion\", with \"text\", all of them strings, \
                  or with a list of \"messages\""
                .into())
        }
    }
}

/// Fisher and Yates's shuffle with the numbers of an epoch.
fn shuffle(items: &mut [usize], stream: &Stream, epoch: u64) {
    let count = items.len() as u64;
    for i in (1..items.len()).rev() {
        let other = stream.integer(epoch * count + i as u64) % (i as u64 + 1);
        items.swap(i, other as usize);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn examples(name: &str, text: &str) -> Result<Examples, DataError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        Examples::read(&path, &Tokenizer::Bytes, (Some(0), None), folder.path(), (3, 2, 8))
    }

    #[test]
    fn answers_are_counted_and_prompts_are_not() {
        let line = "{\"prompt\": \"aaaaa\", \"completion\": \"bbb\"}\n";
        let data = examples("x.jsonl", &line.repeat(9)).unwrap();
        let batch = data.train_batch(0).unwrap();
        let targets = batch.targets.flatten_all().unwrap().to_vec1::<u32>().unwrap();
        let counted: BTreeSet<u32> = batch.counted.to_vec1::<u32>().unwrap().into_iter().collect();
        for (place, token) in (0..).zip(targets) {
            assert_eq!(counted.contains(&place), token != u32::from(b'a'), "{token}");
        }
    }

    #[test]
    fn examples_begin_as_the_tokenizer_says_and_chats_as_their_template_does() {
        let json = serde_json::json!({
            "version": "1.0",
            "pre_tokenizer": { "type": "Whitespace" },
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [
                    { "SpecialToken": { "id": "^", "type_id": 0 } },
                    { "Sequence": { "id": "A", "type_id": 0 } },
                ],
                "pair": [
                    { "Sequence": { "id": "A", "type_id": 0 } },
                    { "Sequence": { "id": "B", "type_id": 0 } },
                ],
                "special_tokens": { "^": { "id": "^", "ids": [7], "tokens": ["^"] } },
            },
            "model": { "type": "WordLevel", "vocab": { "?": 0, "a": 1, "b": 2, "^": 7 }, "unk_token": "?" },
        });
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.jsonl");
        let tokenizer = Tokenizer::from_json(json.to_string().as_bytes(), &path).unwrap();
        let template =
            serde_json::json!({ "chat_template": "{% for m in messages %}{{ m.content }} {% endfor %}" });
        let template = ChatTemplate::from_configuration(&template).unwrap();
        let first = |line: &str| {
            std::fs::write(&path, format!("{line}\n").repeat(9)).unwrap();
            let read =
                Examples::read(&path, &tokenizer, (Some(0), template.as_ref()), folder.path(), (3, 1, 2));
            let tokens = read.unwrap().tokens;
            tokens
                .read(0, 4)
                .unwrap()
                .into_iter()
                .map(|token| (token & !COUNTED, token & COUNTED != 0))
                .collect::<Vec<_>>()
        };
        let prompt = first(r#"{"prompt": "a ", "completion": "b"}"#);
        assert_eq!(prompt, [(7, false), (1, false), (2, true), (0, true)]);
        assert_eq!(first(r#"{"text": "a b"}"#), [(7, false), (1, true), (2, true), (0, true)]);
        let chat =
            r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}"#;
        assert_eq!(first(chat), [(1, false), (2, true), (1, false), (2, true)]);
    }

    #[test]
    fn an_example_is_cut_as_one_text_and_a_token_over_the_border_is_learnt() {
        // Two letters are joined, in front of which a text has a mark, as SentencePiece puts it.
        let json = serde_json::json!({
            "version": "1.0",
            "normalizer": { "type": "Prepend", "prepend": "▁" },
            "model": {
                "type": "BPE", "vocab": { "▁": 0, "a": 1, "b": 2, "c": 3, "bc": 4, "▁a": 5, "é": 6 },
                "merges": ["b c", "▁ a"],
            },
        });
        let tokenizer = Tokenizer::from_json(json.to_string().as_bytes(), Path::new("x.json")).unwrap();
        let tokens = |parts: &[(&str, bool)]| -> Vec<(u32, bool)> {
            let parts: Vec<TextPart> =
                parts.iter().map(|(text, learnt)| ((*text).to_owned(), *learnt)).collect();
            let marked = marked_tokens(&tokenizer, &parts).unwrap();
            let text: String = parts.into_iter().map(|(text, _)| text).collect();
            let bare: Vec<u32> = marked.iter().map(|token| token & !COUNTED).collect();
            assert_eq!(bare, tokenizer.encode(text.as_bytes()).unwrap(), "{text}");
            marked.into_iter().map(|token| (token & !COUNTED, token & COUNTED != 0)).collect()
        };
        assert_eq!(tokens(&[("ab", false), ("ca", true)]), [(5, false), (4, true), (1, true)]);
        assert_eq!(
            tokens(&[("a", false), ("a", true)]),
            [(5, false), (1, true)],
            "one mark at the beginning"
        );
        // Places are bytes, of which é has two.
        assert_eq!(
            tokens(&[("éa", false), ("é", true), ("b", false), ("", true), ("c", false)]),
            [(0, false), (6, false), (1, false), (6, true), (4, false)]
        );
        assert_eq!(tokens(&[("a\0", false), ("a", true)]), [(5, false), (5, true)], "documents stay apart");
    }

    #[test]
    fn an_epoch_sees_every_sequence_for_training_once_and_none_for_validation() {
        let text: String = (0..200).map(|i| char::from(b'0' + (i / 8 % 64) as u8)).collect();
        let data = examples("x.txt", &text).unwrap();
        let firsts = |batch: Packed| batch.inputs.to_vec2::<u32>().unwrap().into_iter().map(|row| row[0]);
        let mut seen: Vec<u32> = (0..data.training() as u64 / 2)
            .flat_map(|number| firsts(data.train_batch(number).unwrap()))
            .collect();
        let count = seen.len();
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen.len(), count);
        let kept = firsts(data.validation_batch(0).unwrap()).next().unwrap();
        assert!(!seen.contains(&kept));
    }

    #[test]
    fn a_line_that_is_no_example_is_named() {
        let error = examples("x.jsonl", "{\"text\": \"a\"}\n{\"txt\": \"b\"}\n").err().unwrap().to_string();
        assert!(error.contains("line 2"), "{error}");
    }
}
