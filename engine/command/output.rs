//! What people and programs read of a command while it runs.

use super::settings::Reporting;
use super::{CommandResult, configuration};
use crate::{StepReport, Trainer};
use anstyle::{AnsiColor, Style};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use std::fmt::Display;
use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

/// Where no progress bar can be drawn, a line is written this often.
const LINE_EVERY: Duration = Duration::from_secs(10);

const ERROR: Style = AnsiColor::Red.on_default().bold();
const NEXT: Style = AnsiColor::Green.on_default().bold();

/// Tells what ended the command, in colour where standard error is a terminal that takes it (`NO_COLOR` is heeded).
pub fn say_error(error: &dyn Display) {
    anstream::eprintln!("{ERROR}error:{ERROR:#} {}", plain(error));
}

/// Tells what to do next.
pub fn say_next(text: impl Display) {
    anstream::eprintln!("{NEXT}next:{NEXT:#} {}", plain(text));
}

/// Text with names that may be a stranger's: what would move a terminal's cursor, change its colours or turn
/// the direction of writing is shown as an escape. Line feeds and tabs stay.
pub fn plain(text: impl Display) -> String {
    let mut plain = String::new();
    for character in text.to_string().chars() {
        let turns = matches!(character, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
        match character {
            '\n' | '\t' => plain.push(character),
            _ if turns || character.is_control() => plain.extend(character.escape_unicode()),
            _ => plain.push(character),
        }
    }
    plain
}

/// An argument for the shell, in quotes where it needs them.
pub fn quoted(text: impl Display) -> String {
    let text = text.to_string();
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=+,@%".contains(c);
    match !text.is_empty() && text.chars().all(is_plain) {
        true => text,
        false => format!("'{}'", text.replace('\'', r"'\''")),
    }
}

/// Where people read: standard output, or standard error if programs read standard output; nowhere if they want it quiet.
pub struct Output {
    json: bool,
    quiet: bool,
    bar: ProgressBar,
    last_line: Option<Instant>,
}

impl Output {
    /// Output as the options say.
    pub fn new(reporting: &Reporting) -> Self {
        Self { json: reporting.json, quiet: reporting.quiet, bar: ProgressBar::hidden(), last_line: None }
    }

    /// Tells what a trainer has noticed of the machine.
    pub fn say_notices(&self, trainer: &Trainer) {
        for notice in trainer.notices() {
            self.say(format_args!("notice: {}", notice.text));
        }
    }

    /// Says something to people. Training goes on when nobody listens any more.
    pub fn say(&self, text: impl Display) {
        if !self.quiet {
            let text = plain(text);
            let _ = self.bar.suspend(|| match self.json {
                true => writeln!(std::io::stderr(), "{text}"),
                false => writeln!(std::io::stdout(), "{text}"),
            });
        }
    }

    /// Tells people what to do next.
    pub fn next(&self, text: impl Display) {
        if !self.quiet && !self.json {
            say_next(text);
        }
    }

    /// Whether anybody reads a text that takes time to make.
    pub fn is_read(&self) -> bool {
        self.json || !self.quiet
    }

    /// Writes an object for programs, if they read.
    ///
    /// # Errors
    /// [`Error::Configuration`](crate::Error::Configuration) if standard output takes no more.
    pub fn object(&self, object: &impl Serialize) -> CommandResult {
        if self.json {
            let line = serde_json::to_string(object)?;
            let mut stdout = std::io::stdout().lock();
            writeln!(stdout, "{line}")
                .and_then(|()| stdout.flush())
                .map_err(|error| configuration(format!("standard output does not take more: {error}")))?;
        }
        Ok(())
    }

    /// Shows that `done` of `steps` steps are made.
    ///
    /// # Errors
    /// None but for a template of the bar that cannot be read.
    pub fn start(&mut self, done: u64, steps: u64) -> CommandResult {
        if std::io::stderr().is_terminal() && !self.quiet {
            let style = ProgressStyle::with_template("{bar:24} {pos}/{len} {msg} [{elapsed} + {eta}]")?;
            self.bar = ProgressBar::new(steps).with_position(done).with_style(style);
            self.bar.reset_eta();
        }
        Ok(())
    }

    /// Shows a step.
    pub fn step(&mut self, report: &StepReport, tokens: u64, steps: u64) {
        let text = format!(
            "loss {:.4}  {:.0} tokens/s  {:.2} s/step  stall {:.0} %",
            report.loss,
            tokens as f64 / report.step_s,
            report.step_s,
            100.0 * report.exposed_stall
        );
        self.bar.set_position(report.step);
        self.bar.set_message(text.clone());
        let due = self.last_line.is_none_or(|last| last.elapsed() >= LINE_EVERY) || report.step == steps;
        if self.bar.is_hidden() && due && !self.quiet {
            self.last_line = Some(Instant::now());
            eprintln!("step {}/{steps}  {text}", report.step);
        }
    }

    /// Shows no progress any more.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use super::{plain, quoted};

    #[test]
    fn what_a_terminal_would_obey_is_shown() {
        assert_eq!(plain("h.0/é\tx\n"), "h.0/é\tx\n");
        assert_eq!(plain("\u{1b}[2J\u{9b}31m\r\u{202e}\0"), r"\u{1b}[2J\u{9b}31m\u{d}\u{202e}\u{0}");
    }

    #[test]
    fn what_a_shell_would_take_apart_is_quoted() {
        assert_eq!(quoted("runs/book-1"), "runs/book-1");
        assert_eq!(quoted("my runs"), "'my runs'");
        assert_eq!(quoted("it's"), r"'it'\''s'");
        assert_eq!(quoted(""), "''");
    }
}
