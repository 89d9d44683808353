//! Cuts PTX text into tokens.

use crate::fault::{Fault, Result};

/// A token of the text.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum TokenKind<'s> {
    /// A name, a number, a directive or an opcode with its modifiers.
    Word(&'s str),
    /// A punctuation mark.
    Symbol(u8),
    /// Text between quotation marks, which nothing needs.
    Text,
}

/// A token and where it is.
#[derive(Clone, Copy, Debug)]
pub struct Token<'s> {
    /// What it is.
    pub kind: TokenKind<'s>,
    /// Line of the text, from 1.
    pub line: u32,
    /// Bytes before its first one.
    pub start: usize,
}

fn belongs_to_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'$' | b'%' | b'.')
}

/// Bytes of the word that starts here, zero where none does. Words have `::` within (`.shared::cta`), but a
/// single colon ends them; a minus sign before a digit is part of the number.
fn word_length(bytes: &[u8]) -> usize {
    let is_negative = bytes.first() == Some(&b'-') && bytes.get(1).is_some_and(u8::is_ascii_digit);
    let mut length = usize::from(is_negative);
    while length < bytes.len() {
        if belongs_to_word(bytes[length]) {
            length += 1;
        } else if bytes[length..].starts_with(b"::") {
            length += 2;
        } else {
            break;
        }
    }
    length
}

/// The tokens of a text whose first line has this number.
pub fn tokens(text: &str, first_line: u32) -> Result<Vec<Token<'_>>> {
    let bytes = text.as_bytes();
    let mut found = Vec::with_capacity(text.len() / 4);
    let (mut at, mut line) = (0, first_line);
    while let Some(&byte) = bytes.get(at) {
        let rest = &bytes[at..];
        let end_of = |end: &[u8], skip: usize, what: &str| {
            let inner = rest.get(skip..).unwrap_or_default();
            let length = inner.windows(end.len()).position(|window| window == end);
            length.map(|length| skip + length + end.len()).ok_or_else(|| Fault::ptx(line, what))
        };
        let kind = match byte {
            _ if byte.is_ascii_whitespace() => None,
            b'/' if rest.starts_with(b"//") => None,
            b'/' if rest.starts_with(b"/*") => None,
            b'"' => Some(TokenKind::Text),
            _ if word_length(rest) > 0 => Some(TokenKind::Word(&text[at..at + word_length(rest)])),
            _ => Some(TokenKind::Symbol(byte)),
        };
        let length = match kind {
            Some(TokenKind::Word(word)) => word.len(),
            Some(TokenKind::Text) => end_of(b"\"", 1, "a text does not end")?,
            Some(TokenKind::Symbol(_)) => 1,
            None if rest.starts_with(b"//") => {
                rest.iter().position(|byte| *byte == b'\n').unwrap_or(rest.len())
            }
            None if rest.starts_with(b"/*") => end_of(b"*/", 2, "a comment does not end")?,
            None => 1,
        };
        if let Some(kind) = kind {
            found.push(Token { kind, line, start: at });
        }
        line += rest[..length].iter().filter(|byte| **byte == b'\n').count() as u32;
        at += length;
    }
    Ok(found)
}

/// The bits of a number: decimal, hexadecimal (`0x`), or a float's (`0f`, `0d`), with or without a sign.
pub fn number(word: &str) -> Option<u64> {
    let (negative, digits) = match word.strip_prefix('-') {
        Some(digits) => (true, digits),
        None => (false, word),
    };
    let digits = digits.strip_suffix('U').unwrap_or(digits);
    if !digits.as_bytes().first()?.is_ascii_digit() {
        return None;
    }
    let value = match digits.get(..2) {
        Some("0x" | "0X" | "0f" | "0F" | "0d" | "0D") => u64::from_str_radix(&digits[2..], 16).ok()?,
        _ => digits.parse().ok()?,
    };
    Some(if negative { value.wrapping_neg() } else { value })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_comments_and_lines() {
        let text = "// first\nld.shared::cta /* two\nlines */ %r1;\nloop: \"text\"";
        let found: Vec<_> = tokens(text, 1).unwrap().iter().map(|token| (token.kind, token.line)).collect();
        let expected = [
            (TokenKind::Word("ld.shared::cta"), 2),
            (TokenKind::Word("%r1"), 3),
            (TokenKind::Symbol(b';'), 3),
            (TokenKind::Word("loop"), 4),
            (TokenKind::Symbol(b':'), 4),
            (TokenKind::Text, 4),
        ];
        assert_eq!(found, expected);
        assert!(tokens("/* open", 1).is_err());
    }

    #[test]
    fn numbers_have_the_bits_that_ptx_gives_them() {
        assert_eq!(number("0f3F800000"), Some(u64::from(1f32.to_bits())));
        assert_eq!(number("0d3FF0000000000000"), Some(1f64.to_bits()));
        assert_eq!(number("-1"), Some(u64::MAX));
        assert_eq!(number("0x10U"), Some(16));
        assert_eq!(number("%r1"), None);
    }
}
