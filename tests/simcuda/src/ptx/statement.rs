//! Parses declarations and the statements of functions.

use super::lexer::{Token, TokenKind, number};
use super::types::{Space, Type};
use crate::fault::{Fault, Result};

/// A variable or parameter.
#[derive(Clone, Debug)]
pub struct Declaration<'s> {
    /// Its name.
    pub name: &'s str,
    /// Its size; zero where the launch chooses it.
    pub bytes: usize,
    /// What its address is a multiple of, at least 1.
    pub alignment: usize,
    /// Bytes of one element.
    pub element_bytes: usize,
}

/// An argument of an instruction.
#[derive(Clone, Debug)]
pub enum Argument<'s> {
    /// A register, constant or variable.
    Name(&'s str),
    /// A predicate with an exclamation mark.
    Not(&'s str),
    /// What is so many bytes after an address.
    Memory(&'s str, i64),
    /// A vector.
    Vector(Vec<&'s str>),
    /// Two results.
    Pair(&'s str, &'s str),
    /// Arguments of a call.
    List(Vec<&'s str>),
}

/// A statement of a function.
#[derive(Clone, Debug)]
pub enum Statement<'s> {
    /// Names that are declared from here on end at the matching [`Statement::EndScope`].
    Scope,
    /// See [`Statement::Scope`].
    EndScope,
    /// Registers: their names, or what begins the names of so many.
    Registers(Type, Vec<(&'s str, Option<usize>)>),
    /// A variable of the function.
    Variable(Space, Declaration<'s>),
    /// Where branches go.
    Label(&'s str),
    /// An instruction, with the predicate that guards it and whether that is negated.
    Instruction {
        /// The predicate, and whether it is negated.
        guard: Option<(&'s str, bool)>,
        /// The opcode with its modifiers.
        opcode: &'s str,
        /// What it is applied to.
        arguments: Vec<Argument<'s>>,
        /// Its line in the text.
        line: u32,
    },
}

/// Takes one token after another.
pub struct Parser<'s> {
    tokens: Vec<Token<'s>>,
    next: usize,
}

impl<'s> Parser<'s> {
    /// A parser of these tokens.
    pub fn new(tokens: Vec<Token<'s>>) -> Self {
        Self { tokens, next: 0 }
    }

    /// The next token, which stays.
    pub fn peek(&self) -> Option<Token<'s>> {
        self.tokens.get(self.next).copied()
    }

    /// The line of the next token, or of the last one.
    pub fn line(&self) -> u32 {
        self.peek().or(self.tokens.last().copied()).map_or(0, |token| token.line)
    }

    fn error<T>(&self, reason: impl std::fmt::Display) -> Result<T> {
        Err(Fault::ptx(self.line(), reason))
    }

    /// Takes the next token.
    pub fn take(&mut self) -> Result<Token<'s>> {
        let Some(token) = self.peek() else { return self.error("the text ends too early") };
        self.next += 1;
        Ok(token)
    }

    /// Whether the next token is this symbol.
    pub fn is_symbol(&self, symbol: u8) -> bool {
        self.peek().is_some_and(|token| token.kind == TokenKind::Symbol(symbol))
    }

    /// Takes this symbol if it is next.
    pub fn eat(&mut self, symbol: u8) -> bool {
        let found = self.is_symbol(symbol);
        self.next += usize::from(found);
        found
    }

    /// Takes this symbol, which has to be next.
    pub fn symbol(&mut self, symbol: u8) -> Result<()> {
        if self.eat(symbol) { Ok(()) } else { self.error(format!("'{}' is missing", char::from(symbol))) }
    }

    /// The next token, if it is a word.
    pub fn peek_word(&self) -> Option<&'s str> {
        match self.peek()?.kind {
            TokenKind::Word(word) => Some(word),
            _ => None,
        }
    }

    /// Takes a word, which has to be next.
    pub fn word(&mut self) -> Result<&'s str> {
        let Some(word) = self.peek_word() else { return self.error("a word is missing") };
        self.next += 1;
        Ok(word)
    }

    /// Takes a number, which has to be next.
    pub fn number(&mut self) -> Result<u64> {
        let word = self.word()?;
        number(word).map_or_else(|| self.error(format!("{word} is not a number")), Ok)
    }

    /// Takes `[.align N] .type name [ '[' N ']' ]`.
    pub fn declaration(&mut self) -> Result<Declaration<'s>> {
        let (mut alignment, mut element_bytes) = (0, 0);
        loop {
            let word = self.word()?;
            match word {
                ".align" => alignment = self.number()? as usize,
                ".ptr" | ".global" => {}
                _ => match word.strip_prefix('.').and_then(Type::named) {
                    Some(kind) => element_bytes = kind.bytes(),
                    None => {
                        let mut elements = 1;
                        if self.eat(b'[') {
                            elements = if self.is_symbol(b']') { 0 } else { self.number()? as usize };
                            self.symbol(b']')?;
                        }
                        let alignment = alignment.max(element_bytes).max(1);
                        let bytes = element_bytes * elements;
                        return Ok(Declaration { name: word, bytes, alignment, element_bytes });
                    }
                },
            }
        }
    }

    /// Takes the parameters of a function, with their parentheses.
    pub fn parameters(&mut self) -> Result<Vec<Declaration<'s>>> {
        let mut found = vec![];
        self.symbol(b'(')?;
        while !self.eat(b')') {
            let space = self.word()?;
            if space != ".param" && space != ".reg" {
                return self.error(format!("{space} is no parameter"));
            }
            found.push(self.declaration()?);
            self.eat(b',');
        }
        Ok(found)
    }

    fn words(&mut self, end: u8) -> Result<Vec<&'s str>> {
        let mut found = vec![];
        while !self.eat(end) {
            found.push(self.word()?);
            self.eat(b',');
        }
        Ok(found)
    }

    fn argument(&mut self) -> Result<Argument<'s>> {
        if self.eat(b'[') {
            let address = self.word()?;
            self.eat(b'+');
            let offset = if self.is_symbol(b']') { 0 } else { self.number()? as i64 };
            self.symbol(b']')?;
            return Ok(Argument::Memory(address, offset));
        }
        if self.eat(b'{') {
            return Ok(Argument::Vector(self.words(b'}')?));
        }
        if self.eat(b'(') {
            return Ok(Argument::List(self.words(b')')?));
        }
        if self.eat(b'!') {
            return Ok(Argument::Not(self.word()?));
        }
        let name = self.word()?;
        if self.eat(b'|') {
            return Ok(Argument::Pair(name, self.word()?));
        }
        Ok(Argument::Name(name))
    }

    /// Takes the statements up to the end of the tokens, which are those between a function's braces.
    pub fn statements(&mut self) -> Result<Vec<Statement<'s>>> {
        let mut found = vec![];
        while self.peek().is_some() {
            if self.eat(b'{') {
                found.push(Statement::Scope);
            } else if self.eat(b'}') {
                found.push(Statement::EndScope);
            } else if !self.eat(b';') {
                found.extend(self.statement()?);
            }
        }
        Ok(found)
    }

    fn statement(&mut self) -> Result<Option<Statement<'s>>> {
        let line = self.line();
        let mut guard = None;
        if self.eat(b'@') {
            let negated = self.eat(b'!');
            guard = Some((self.word()?, negated));
        }
        let word = self.word()?;
        if self.eat(b':') {
            return Ok(Some(Statement::Label(word)));
        }
        if word.starts_with(".reg") {
            return self.registers(word).map(Some);
        }
        let space = match word {
            ".local" | ".param" => Some(Space::Local),
            ".shared" => Some(Space::Shared),
            ".loc" | ".pragma" => {
                // The place in the source ends with its line, the other with a semicolon.
                while self.peek().is_some() && !self.eat(b';') && (word != ".loc" || self.line() == line) {
                    self.take()?;
                }
                return Ok(None);
            }
            _ => None,
        };
        if let Some(space) = space {
            let declaration = self.declaration()?;
            self.symbol(b';')?;
            return Ok(Some(Statement::Variable(space, declaration)));
        }
        let mut arguments = vec![];
        while !self.eat(b';') {
            arguments.push(self.argument()?);
            self.eat(b',');
        }
        Ok(Some(Statement::Instruction { guard, opcode: word, arguments, line }))
    }

    /// Takes what follows `.reg`, whose type may be part of the word.
    fn registers(&mut self, word: &'s str) -> Result<Statement<'s>> {
        let kind = match word.strip_prefix(".reg").filter(|rest| !rest.is_empty()) {
            Some(kind) => kind,
            None => self.word()?,
        };
        let Some(kind) = Type::named(kind.trim_start_matches('.')) else {
            return self.error(format!("{kind} is not a type"));
        };
        let mut names = vec![];
        loop {
            let name = self.word()?;
            let mut count = None;
            if self.eat(b'<') {
                count = Some(self.number()? as usize);
                self.symbol(b'>')?;
            }
            names.push((name, count));
            if !self.eat(b',') {
                break;
            }
        }
        self.symbol(b';')?;
        Ok(Statement::Registers(kind, names))
    }
}
