//! Modules that programs have loaded.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use super::State;
use crate::fault::{Code, Fault, Result};
use crate::program::Program;
use crate::ptx::Module;

/// A module, and where its variables are.
pub struct Loaded {
    module: Arc<Module>,
    variables: Arc<Vec<u64>>,
}

/// A kernel of a loaded module.
pub struct Function {
    /// What it does.
    pub program: Arc<Program>,
    /// Addresses of its module's variables.
    pub variables: Arc<Vec<u64>>,
    /// What it is, for a person.
    pub label: Arc<str>,
}

/// Every text that the process has loaded: programs load the same modules for each device that they open.
static PARSED: Mutex<Option<HashMap<String, Arc<Module>>>> = Mutex::new(None);

fn parsed(text: &str) -> Result<Arc<Module>> {
    let mut parsed = PARSED.lock().unwrap_or_else(PoisonError::into_inner);
    let parsed = parsed.get_or_insert_default();
    if let Some(module) = parsed.get(text) {
        return Ok(module.clone());
    }
    let module = Arc::new(Module::parse(text)?);
    parsed.insert(text.to_owned(), module.clone());
    Ok(module)
}

impl State {
    /// Loads a module; answers its handle.
    pub fn load_module(&mut self, text: &str) -> Result<usize> {
        if !text.contains(".version") {
            return Err(Fault::new(Code::NoBinaryForGpu, "a module that is not PTX text cannot be loaded"));
        }
        let module = parsed(text)?;
        let mut variables = vec![];
        for variable in &module.variables {
            let address = self.memory.allocate(variable.initial.len(), 0);
            let place = self.memory.whole(address, "variable")?;
            self.memory.bytes_mut(place).copy_from_slice(&variable.initial);
            variables.push(address);
        }
        let handle = self.new_handle();
        self.modules.insert(handle, Loaded { module, variables: Arc::new(variables) });
        Ok(handle)
    }

    /// The handle of a kernel in a module.
    pub fn function(&mut self, module: usize, name: &str) -> Result<usize> {
        let loaded = self.modules.get(&module);
        let loaded = loaded.ok_or_else(|| Fault::new(Code::InvalidHandle, "this module is not loaded"))?;
        let function = Function {
            program: loaded.module.program(name)?,
            variables: loaded.variables.clone(),
            label: format!("kernel {name}").into(),
        };
        let handle = self.new_handle();
        self.functions.insert(handle, Arc::new(function));
        Ok(handle)
    }
}
