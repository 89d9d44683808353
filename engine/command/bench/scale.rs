//! `ferrozero bench scale`: the largest model that the planner finds a plan for, by memory. Nothing is run:
//! these are predictions, as those of `ferrozero plan`.

use super::super::CommandResult;
use super::super::plan::{QuestionArguments, answer, largest, question};
use crate::byte_size::ByteSize;
use crate::estimate::question::Answer;
use crate::planner::plan::Bytes;
use serde_json::json;

/// A family of models, a machine, and how much of its host memory to grant.
#[derive(Debug, Clone, clap::Args)]
pub struct ScaleArguments {
    /// Host memory to grant, several sizes with commas between
    #[arg(long, value_name = "SIZES", value_delimiter = ',', default_value = "1GiB,2GiB,4GiB,8GiB")]
    grants: Vec<ByteSize>,
    #[command(flatten)]
    question: QuestionArguments,
    /// Write the answer as JSON
    #[arg(long)]
    json: bool,
}

/// Runs the bench.
pub fn run(arguments: ScaleArguments) -> CommandResult {
    let mut rows = vec![];
    let mut machine = String::new();
    for &grant in &arguments.grants {
        let mut question = question(&arguments.question, Some(grant))?;
        machine.clone_from(&question.machine.name);
        let sequences = arguments.question.sequences;
        let answer = match largest(&question, sequences) {
            Some(shape) => {
                question.shape = shape.clone();
                Some((shape.parameters(), answer(question, sequences)?.1))
            }
            None => None,
        };
        rows.push((grant, answer));
    }
    match arguments.json {
        true => println!("{}", object(&rows)),
        false => print(&machine, &rows),
    }
    Ok(())
}

/// Memory, and if there is one the largest model in it: its parameters and its plan.
type Row = (ByteSize, Option<(u64, Answer)>);

fn object(rows: &[Row]) -> serde_json::Value {
    let rows = rows.iter().map(|(grant, found)| match found {
        None => json!({ "granted_bytes": grant.0, "parameters": null }),
        Some((parameters, answer)) => json!({
            "granted_bytes": grant.0,
            "parameters": parameters,
            "parameters_per_byte": *parameters as f64 / grant.0 as f64,
            "device_bytes": answer.plan.device_bytes(),
            "disk_bytes": answer.disk_bytes,
            "step_s": answer.forecast.step_s,
            "tokens_per_s": answer.tokens_per_s,
            "busiest": answer.forecast.busiest,
        }),
    });
    json!({ "predicted": true, "rows": rows.collect::<Vec<_>>() })
}

fn print(machine: &str, rows: &[Row]) {
    println!("Predicted, not measured, for {machine}.\n");
    println!(
        "| host memory | largest model | parameters a GiB | device | files | a step | tokens/s | bottleneck |"
    );
    println!("|---|---|---|---|---|---|---|---|");
    for (grant, found) in rows {
        let Some((parameters, answer)) = found else {
            println!("| {grant} | none | | | | | | |");
            continue;
        };
        let parameters = *parameters as f64;
        println!(
            "| {grant} | {:.2} G | {:.0} M | {} | {} | {:.2} s | {:.1} | {} |",
            parameters / 1e9,
            parameters / (grant.0 as f64 / (1u64 << 30) as f64) / 1e6,
            Bytes(answer.plan.device_bytes()),
            Bytes(answer.disk_bytes),
            answer.forecast.step_s,
            answer.tokens_per_s,
            answer.forecast.busiest.name(),
        );
    }
}
