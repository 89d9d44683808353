//! Names of operations and requests, for errors.

use super::{ComputeRequest, Dispatcher};
use crate::schedule::operation::Operation;

impl Dispatcher {
    /// Name of the segment that a compute operation runs; of the other ones, what they are.
    pub(super) fn segment_of(&self, operation: Operation) -> String {
        match operation {
            Operation::Forward { call, .. } | Operation::Backward { call, .. } => self.name_of(call),
            _ => self.describe(&operation),
        }
    }

    /// The same of what is asked for.
    pub(super) fn segment_asked_for(&self, request: ComputeRequest) -> String {
        match request {
            ComputeRequest::Forward(group) => self.performer.layout.groups[group].name.clone(),
            ComputeRequest::Backward(call) => self.name_of(call),
            _ => self.describe_request(request),
        }
    }

    fn name_of(&self, call: usize) -> String {
        self.performer.layout.groups[self.performer.calls[call].group].name.clone()
    }

    pub(super) fn describe(&self, operation: &Operation) -> String {
        match *operation {
            Operation::Forward { call, .. } => format!("the forward of {}", self.name_of(call)),
            Operation::Backward { call, .. } => format!("the backward of {}", self.name_of(call)),
            Operation::Attach { .. } => "the start of a pass".into(),
            _ => "the end of the pass".into(),
        }
    }

    pub(super) fn describe_request(&self, request: ComputeRequest) -> String {
        match request {
            ComputeRequest::Forward(group) => {
                format!("the forward of {}", self.performer.layout.groups[group].name)
            }
            ComputeRequest::Backward(call) => {
                format!("the backward of {}", self.name_of(call))
            }
            ComputeRequest::Attach => "the start of a pass".into(),
            ComputeRequest::Detach => "the end of the pass".into(),
        }
    }
}
