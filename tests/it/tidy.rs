//! The style that a machine can check, so that nobody has to.

use std::fs;
use std::path::{Path, PathBuf};

/// Longest file of the library, in lines: longer ones are two rooms.
const LONGEST_FILE_LINES: usize = 600;
/// Longest README, in lines.
const LONGEST_README_LINES: usize = 150;
/// No line at all.
const NONE: Vec<usize> = vec![];
/// Widest line of code, comments and documents, in columns.
const WIDEST_LINE: usize = 110;

/// Every file that is ours, by extension.
fn sources(extension: &str) -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut folders = vec![root.to_owned()];
    let mut found = vec![];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            if path.is_dir() && name != "target" && !name.starts_with('.') {
                folders.push(path);
            } else if path.extension().is_some_and(|found| found == extension) {
                found.push(path);
            }
        }
    }
    found
}

fn library_sources() -> impl Iterator<Item = (PathBuf, String)> {
    let of_library = |path: &PathBuf| {
        let path = path.strip_prefix(env!("CARGO_MANIFEST_DIR")).unwrap();
        !["tests", "benches", "examples", "fuzz"]
            .iter()
            .any(|folder| path.components().any(|c| c.as_os_str() == *folder))
    };
    sources("rs").into_iter().filter(of_library).map(|path| {
        let text = fs::read_to_string(&path).unwrap();
        (path, text)
    })
}

/// The text before the unit tests.
fn before_tests(text: &str) -> &str {
    text.split("#[cfg(test)]").next().unwrap_or(text)
}

#[test]
fn files_are_rooms_and_not_halls() {
    for (path, text) in library_sources() {
        let lines = before_tests(&text).lines().count();
        assert!(lines <= LONGEST_FILE_LINES, "{} has {lines} lines", path.display());
    }
}

/// What no user, file or device can cause may panic, where a comment says why it cannot happen.
#[test]
fn the_library_does_not_panic_on_what_a_user_or_a_file_does() {
    // Spelled so that this file does not find itself.
    let calls = ["unwrap", "expect"].map(|name| format!(".{name}("));
    let macros = ["panic", "todo", "unimplemented"].map(|name| format!("{name}!("));
    for (path, text) in library_sources() {
        let mut excused = false;
        for (number, line) in before_tests(&text).lines().enumerate() {
            let is_code = !line.trim_start().starts_with("//") && !std::mem::take(&mut excused);
            excused = line.contains("// INVARIANT:");
            let found = calls.iter().chain(&macros).find(|call| is_code && line.contains(call.as_str()));
            assert!(found.is_none(), "{}:{}: {line}: make it an error", path.display(), number + 1);
        }
    }
}

#[test]
fn unsafe_code_stays_where_it_is_needed() {
    let allowed = [
        "arena", "bin", "cuda", "memory", "uring", "io", "simd", "adamw", "gradient", "convert", "ops",
        "vector",
    ];
    for (path, text) in library_sources() {
        let has_unsafe = before_tests(&text).lines().any(|line| {
            let code = line.split("//").next().unwrap_or(line);
            code.contains("unsafe {") || code.contains("unsafe fn") || code.contains("unsafe impl")
        });
        let here = path.with_extension("");
        let in_place = here.components().any(|part| allowed.iter().any(|name| part.as_os_str() == *name));
        assert!(
            !has_unsafe || in_place,
            "{} has unsafe code: see the rooms in ARCHITECTURE.md",
            path.display()
        );
    }
}

#[test]
fn every_module_says_what_it_is_for() {
    for (path, text) in library_sources() {
        assert!(text.starts_with("//!"), "{} does not start with //!", path.display());
    }
}

/// Numbers, from 1, of the lines that are too wide. Rows of tables may be, because Markdown cannot break them, and
/// addresses do not count.
fn wide_lines(text: &str) -> Vec<usize> {
    let is_row = |line: &str| {
        let line = line.trim_start();
        let row = line.strip_prefix("//").map_or(line, |comment| comment.trim_start_matches(['/', '!', ' ']));
        row.starts_with('|') && row.trim_end().ends_with('|')
    };
    let columns = |line: &str| {
        let words = line.split(' ').filter(|word| !word.contains("://"));
        words.map(|word| word.chars().count() + 1).sum::<usize>().saturating_sub(1)
    };
    let lines = text.lines().enumerate();
    lines
        .filter(|(_, line)| columns(line) > WIDEST_LINE && !is_row(line))
        .map(|(number, _)| number + 1)
        .collect()
}

#[test]
fn lines_fit_beside_each_other() {
    for extension in ["py", "toml"] {
        for path in sources(extension) {
            let wide = wide_lines(&fs::read_to_string(&path).unwrap());
            assert!(wide.is_empty(), "{}:{wide:?}: more than {WIDEST_LINE} columns", path.display());
        }
    }
}

#[test]
fn a_wide_line_is_found() {
    let (fits, wide) = ("x".repeat(WIDEST_LINE), "é ".repeat(WIDEST_LINE));
    let row = format!("| {wide} |");
    let address = format!("see https://example.com/{fits}");
    assert_eq!(wide_lines(&format!("{fits}\n{row}\n/// {row}\n{address}")), NONE);
    for planted in [
        format!("{fits}x"),
        wide.clone(),
        format!("// {fits}"),
        format!("| {wide}"),
        format!("{address} {fits}"),
    ] {
        assert_eq!(wide_lines(&format!("first\n{planted}\nlast")), vec![2], "{planted}");
    }
}

/// What somebody reads first is a page, and what is more than that has a page of its own.
#[test]
fn the_readme_is_a_page() {
    let lines = include_str!("../../README.md").lines().count();
    assert!(lines <= LONGEST_README_LINES, "README.md has {lines} lines");
}

/// Places in the project that a document links to.
fn links(text: &str) -> impl Iterator<Item = &str> {
    let ends = text.split("](").skip(1).filter_map(|rest| rest.split(')').next());
    ends.filter(|link| !link.contains("://") && !link.starts_with('#'))
        .filter_map(|link| link.split('#').next())
}

#[test]
fn links_between_documents_lead_somewhere() {
    for path in sources("md") {
        let text = fs::read_to_string(&path).unwrap();
        for link in links(&text) {
            let there = path.parent().unwrap().join(link);
            assert!(there.exists(), "{}: a link to {link}, which is not there", path.display());
        }
    }
}

/// Lines, from 1, of tables that no command in a line of its own stands before, since the table before them.
fn tables_without_command(text: &str) -> Vec<usize> {
    let (mut command, mut in_table, mut found) = (false, false, vec![]);
    for (number, line) in text.lines().enumerate() {
        let is_row = line.starts_with('|');
        if is_row && !in_table && !command {
            found.push(number + 1);
        }
        // A table uses its command up.
        command =
            (command && !is_row) || ["`scripts/", "`ferrozero "].iter().any(|start| line.contains(start));
        in_table = is_row;
    }
    found
}

/// A figure that nobody can measure again is a claim.
#[test]
fn figures_have_the_command_that_makes_them() {
    assert_eq!(tables_without_command(include_str!("../../docs/benchmarks.md")), NONE);
    let planted = "`scripts/a`\n\n| a |\n|---|\n\nmore\n\n| b |\n|---|\n";
    assert_eq!(tables_without_command(planted), vec![8]);
}

#[test]
fn text_files_are_clean() {
    for extension in ["rs", "md", "toml", "py"] {
        for path in sources(extension) {
            let text = fs::read_to_string(&path).unwrap();
            for (number, line) in text.lines().enumerate() {
                let place = format!("{}:{}", path.display(), number + 1);
                assert!(!line.contains('\t'), "{place}: a tab");
                assert_eq!(line, line.trim_end(), "{place}: space at the end");
            }
            assert!(
                text.is_empty() || text.ends_with('\n'),
                "{} does not end with a new line",
                path.display()
            );
        }
    }
}
