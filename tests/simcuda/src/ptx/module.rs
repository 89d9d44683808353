//! The functions and variables of a PTX text.
//!
//! Programs load large modules and use few of their kernels, so a function's body is looked at when its
//! kernel is asked for.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use super::lexer::{self, Token, TokenKind};
use super::lowering::{self, Kernel};
use super::statement::{Declaration, Parser, Statement};
use crate::fault::{Code, Fault, Result};
use crate::program::Program;

/// A parameter, or memory that all kernels of a module share by its name.
#[derive(Clone, Debug)]
pub struct Item {
    /// Its name.
    pub name: String,
    /// Its size; zero where the launch chooses it.
    pub bytes: usize,
    /// What its address is a multiple of.
    pub alignment: usize,
}

impl From<Declaration<'_>> for Item {
    fn from(declaration: Declaration<'_>) -> Self {
        let Declaration { name, bytes, alignment, .. } = declaration;
        Self { name: name.to_owned(), bytes, alignment }
    }
}

/// A function: its header, and where its statements are.
#[derive(Debug)]
pub struct Function {
    is_kernel: bool,
    /// Its parameters, in order.
    pub parameters: Vec<Item>,
    /// Its results, in order.
    pub results: Vec<Item>,
    body: Range<usize>,
    line: u32,
}

/// A variable in global or constant memory.
#[derive(Debug)]
pub struct Variable {
    /// Its name.
    pub name: String,
    /// Its bytes when the module is loaded.
    pub initial: Vec<u8>,
}

/// A PTX text whose functions are known by name.
pub struct Module {
    text: String,
    functions: HashMap<String, Function>,
    /// Variables, in the order of their numbers in operands.
    pub variables: Vec<Variable>,
    /// Shared memory that is declared outside of functions.
    pub shared: Vec<Item>,
    programs: Mutex<HashMap<String, Arc<Program>>>,
}

impl Module {
    /// Finds what the text declares.
    pub fn parse(text: &str) -> Result<Self> {
        let mut module = Self {
            text: text.to_owned(),
            functions: HashMap::new(),
            variables: vec![],
            shared: vec![],
            programs: Mutex::default(),
        };
        let mut parser = Parser::new(lexer::tokens(text, 1)?);
        while parser.peek().is_some() {
            module.item(&mut parser)?;
        }
        Ok(module)
    }

    fn item(&mut self, parser: &mut Parser<'_>) -> Result<()> {
        let line = parser.line();
        match parser.word()? {
            ".version" | ".address_size" => {
                parser.word()?;
            }
            ".target" => {
                parser.word()?;
                while parser.eat(b',') {
                    parser.word()?;
                }
            }
            ".visible" | ".weak" | ".extern" | ".common" => {}
            ".global" | ".const" => {
                let variable = variable(parser)?;
                self.variables.push(variable);
            }
            ".shared" => {
                self.shared.push(parser.declaration()?.into());
                parser.symbol(b';')?;
            }
            ".entry" => self.function(parser, true)?,
            ".func" => self.function(parser, false)?,
            ".file" | ".section" => skip_debug_information(parser)?,
            other => return Err(Fault::ptx(line, format!("{other} is not expected here"))),
        }
        Ok(())
    }

    fn function(&mut self, parser: &mut Parser<'_>, is_kernel: bool) -> Result<()> {
        let items = |found: Vec<Declaration<'_>>| found.into_iter().map(Item::from).collect();
        let has_results = !is_kernel && parser.is_symbol(b'(');
        let results = if has_results { items(parser.parameters()?) } else { vec![] };
        let name = parser.word()?.to_owned();
        let parameters = if parser.is_symbol(b'(') { items(parser.parameters()?) } else { vec![] };
        // Directives such as `.maxntid 256, 1, 1`, which change no result.
        while parser.peek_word().is_some() || parser.is_symbol(b',') {
            parser.take()?;
        }
        if parser.eat(b';') {
            return Ok(());
        }
        let (body, line) = skip_body(parser)?;
        self.functions.insert(name, Function { is_kernel, parameters, results, body, line });
        Ok(())
    }

    /// The function of this name.
    pub fn function_named(&self, name: &str) -> Option<&Function> {
        self.functions.get(name)
    }

    /// The statements of a function.
    pub fn statements(&self, function: &Function) -> Result<Vec<Statement<'_>>> {
        let tokens = lexer::tokens(&self.text[function.body.clone()], function.line)?;
        Parser::new(tokens).statements()
    }

    /// The kernel of this name, ready to run. It is made once.
    pub fn program(&self, name: &str) -> Result<Arc<Program>> {
        let mut programs = self.programs.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(program) = programs.get(name) {
            return Ok(program.clone());
        }
        let function = self.functions.get(name).filter(|function| function.is_kernel);
        let function = function
            .ok_or_else(|| Fault::new(Code::NotFound, format!("the module has no kernel named {name}")))?;
        let kernel: Kernel = lowering::kernel(self, name, function).map_err(|fault| fault.at(name))?;
        let program = Arc::new(Program::new(kernel).map_err(|fault| fault.at(name))?);
        programs.insert(name.to_owned(), program.clone());
        Ok(program)
    }
}

/// Takes the declaration of a variable with its first values.
fn variable(parser: &mut Parser<'_>) -> Result<Variable> {
    let declaration = parser.declaration()?;
    let mut initial = vec![];
    if parser.eat(b'=') {
        let is_list = parser.eat(b'{');
        loop {
            let value = parser.number()?;
            initial.extend_from_slice(&value.to_le_bytes()[..declaration.element_bytes.max(1)]);
            if !parser.eat(b',') {
                break;
            }
        }
        if is_list {
            parser.symbol(b'}')?;
        }
    }
    parser.symbol(b';')?;
    initial.resize(declaration.bytes, 0);
    Ok(Variable { name: declaration.name.to_owned(), initial })
}

fn skip_debug_information(parser: &mut Parser<'_>) -> Result<()> {
    let is_part = |token: Token<'_>| match token.kind {
        TokenKind::Text => true,
        TokenKind::Word(word) => lexer::number(word).is_some() || word.starts_with(".debug"),
        TokenKind::Symbol(symbol) => symbol == b',',
    };
    while parser.peek().is_some_and(is_part) {
        parser.take()?;
    }
    if parser.eat(b'{') {
        while !parser.eat(b'}') {
            parser.take()?;
        }
    }
    Ok(())
}

/// Takes a function's body with its braces: the bytes between them, and the line where they begin.
fn skip_body(parser: &mut Parser<'_>) -> Result<(Range<usize>, u32)> {
    let line = parser.line();
    let start = parser.peek().map_or(0, |token| token.start) + 1;
    parser.symbol(b'{')?;
    let mut depth = 1;
    loop {
        let token = parser.take()?;
        match token.kind {
            TokenKind::Symbol(b'{') => depth += 1,
            TokenKind::Symbol(b'}') => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return Ok((start..token.start, line));
        }
    }
}
