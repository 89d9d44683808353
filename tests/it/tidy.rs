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
        // The software driver is no test, though it is for tests.
        if path.starts_with("tests/simcuda/src") {
            return true;
        }
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
    // The last four are of the software driver: the C interface, copies from and to the host, products, and
    // the end of a process.
    let allowed = [
        "arena", "bin", "cuda", "memory", "uring", "io", "simd", "adamw", "gradient", "convert", "ops",
        "vector", "api", "work", "gemm", "exit",
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

/// The rooms of the engine, files or folders, from the bottom to the top: each may use itself and those
/// before it.
const ROOMS: [&str; 22] = [
    "error",
    "sync",
    "statistics",
    "byte_size",
    "data",
    "schedule",
    "planner",
    "device",
    "execution",
    "probe",
    "autograd",
    "config",
    "disk",
    "train",
    "engine",
    "tiled_linear",
    "observe",
    "models",
    "estimate",
    "lib",
    "command",
    "bin",
];

fn is_room(name: &str) -> bool {
    ROOMS.contains(&name)
}

/// The modules of a file, by its path within the engine: `disk/stores.rs` is `disk::stores`.
fn modules_of(file: &str) -> Vec<&str> {
    file.trim_end_matches(".rs").trim_end_matches("/mod").split('/').collect()
}

/// What the code of a file uses by `crate::…` and `super::…`, as modules from the root on, with the line.
/// What is in no room has its name from lib.rs.
fn uses<'a>(file: &'a str, text: &'a str) -> Vec<(usize, Vec<&'a str>)> {
    let mut found = vec![];
    for (number, line) in (1..).zip(text.lines()).filter(|(_, line)| !line.trim_start().starts_with("//")) {
        for start in
            line.match_indices("crate::").chain(line.match_indices("super::")).map(|(start, _)| start)
        {
            let before = line[..start].chars().next_back().unwrap_or(' ');
            if before == ':' || before == '_' || before.is_alphanumeric() {
                continue;
            }
            let is_end = |c: char| c != ':' && c != '_' && !c.is_alphanumeric();
            let path = line[start..].split(is_end).next().unwrap_or_default();
            let names: Vec<&str> = path.split("::").filter(|name| !name.is_empty()).collect();
            let up = names.iter().take_while(|&&name| name == "super").count();
            let own = modules_of(file);
            let used = match names.get(up.max(1)) {
                Some(name) if is_room(name) && up != 0 && up < own.len() => continue,
                Some(name) if is_room(name) => names[up.max(1)..].to_vec(),
                _ if up > 0 => continue,
                _ => vec!["lib"],
            };
            found.push((number, used));
        }
    }
    found
}

/// What uses a room above its own, among files given as path within the engine and text.
fn uses_of_higher_rooms(files: &[(&str, &str)]) -> Vec<String> {
    let floor = |modules: &[&str]| ROOMS.iter().position(|room| modules.first() == Some(room));
    let file_of = |used: &[&str]| {
        let lengths = (1..=used.len()).rev();
        let mut known = lengths.filter_map(|length| {
            files.iter().find(|(file, _)| modules_of(file) == used[..length]).map(|(file, _)| *file)
        });
        known.next().unwrap_or(used[0]).to_owned()
    };
    let mut found = vec![];
    for (file, text) in files {
        let Some(own) = floor(&modules_of(file)) else {
            found.push(format!("engine/{file} is in no room: add its room to ROOMS"));
            continue;
        };
        for (number, used) in uses(file, text) {
            if floor(&used) > Some(own) {
                found.push(format!(
                    "engine/{file}:{number} uses engine/{}, which is above it",
                    file_of(&used)
                ));
            }
        }
    }
    found
}

/// ARCHITECTURE.md says what each room is for.
#[test]
fn rooms_use_only_rooms_below_them() {
    let engine = Path::new(env!("CARGO_MANIFEST_DIR")).join("engine");
    let of_engine = library_sources().filter_map(|(path, text)| {
        let file = path.strip_prefix(&engine).ok()?;
        Some((file.display().to_string(), text))
    });
    let files: Vec<(String, String)> = of_engine.collect();
    let files: Vec<(&str, &str)> = files.iter().map(|(file, text)| (file.as_str(), text.as_str())).collect();
    for room in ROOMS {
        assert!(files.iter().any(|(file, _)| modules_of(file)[0] == room), "there is no room {room}");
    }
    let found = uses_of_higher_rooms(&files);
    assert!(found.is_empty(), "imports run from the top to the bottom of ROOMS:\n{}", found.join("\n"));
}

#[test]
fn a_use_of_a_higher_room_is_found() {
    let stores = ("disk/stores.rs", "");
    let found = |file: &'static str, text: &'static str| uses_of_higher_rooms(&[stores, (file, text)]);
    let above = |place: &str| vec![format!("engine/{place} uses engine/disk/stores.rs, which is above it")];
    let planted = "use crate::error::Error;\nuse crate::disk::stores::{\n    Stores,\n};\n";
    assert_eq!(found("device/compute.rs", planted), above("device/compute.rs:2"));
    assert_eq!(
        found("device/compute.rs", "fn open() -> crate::disk::stores::Stores {"),
        above("device/compute.rs:1")
    );
    assert_eq!(found("device/compute.rs", "use super::super::disk::stores;"), above("device/compute.rs:1"));
    assert_eq!(found("device/compute.rs", "use crate::Engine;").len(), 1, "by way of lib.rs");
    assert_eq!(found("attic/box.rs", "").len(), 1, "no room");
    for fine in [
        "use crate::schedule::layout::Layout;",
        "use super::tensor_storage::{self, TensorStorage};",
        "// [`Engine`](crate::engine::Engine) is above.",
        "use ferrozero_kernels::convert;",
    ] {
        assert_eq!(found("device/compute.rs", fine), <[&str; 0]>::default(), "{fine}");
    }
    assert_eq!(found("train/trainer.rs", planted), <[&str; 0]>::default());
}

#[test]
fn every_module_says_what_it_is_for() {
    for (path, text) in library_sources() {
        assert!(text.starts_with("//!"), "{} does not start with //!", path.display());
    }
}

/// Numbers, from 1, of the lines that are too wide. Rows of tables may be, because Markdown cannot break
/// them, and addresses do not count.
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
    for extension in ["md", "py", "toml"] {
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

/// Files and folders of the project that a document names as code.
fn paths(text: &str) -> impl Iterator<Item = &str> {
    let folders =
        ["benches/", "docs/", "engine/", "examples/", "fuzz/", "kernels/", "offload/", "scripts/", "tests/"];
    let is_path = |word: &str| word.chars().all(|each| each.is_ascii_alphanumeric() || "_./-".contains(each));
    let code = text.split('`').skip(1).step_by(2);
    code.filter(move |word| folders.iter().any(|folder| word.starts_with(folder)) && is_path(word))
}

/// What has moved is named where it is now; a changelog says where it was.
#[test]
fn documents_name_files_that_are_there() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for document in sources("md").into_iter().filter(|path| !path.ends_with("CHANGELOG.md")) {
        let text = fs::read_to_string(&document).unwrap();
        for path in paths(&text) {
            let here = document.parent().unwrap().join(path);
            assert!(root.join(path).exists() || here.exists(), "{}: {path} is not there", document.display());
        }
    }
    let planted =
        "In `tests/it`, not tests/none,\n```sh\nls engine/none\n```\nand `scripts/a_*`: `engine/none.rs`.";
    assert_eq!(paths(planted).collect::<Vec<_>>(), ["tests/it", "engine/none.rs"]);
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
