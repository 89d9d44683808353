//! Reads an opcode with its modifiers, such as `ld.global.v4.f32`.

use super::types::{Combine, Comparison, Instruction, Opcode, Rounding, Shuffle, Space, Type};

/// The instruction that an opcode with its modifiers names, still without operands. The reason, where it is
/// not known.
pub fn instruction(text: &str, line: u32) -> Result<Instruction, String> {
    let mut parts = text.split('.');
    let name = parts.next().unwrap_or_default();
    let mut found = Instruction::new(Opcode::Fence, line);
    let (mut kinds, mut width) = (0, Width::Low);
    for part in parts {
        if let Some(kind) = Type::named(part) {
            // The second type stands for the first one where only one is named.
            if kinds == 0 {
                found.kind = kind;
            }
            found.source_kind = kind;
            kinds += 1;
            continue;
        }
        match part {
            "wide" => width = Width::Wide,
            "hi" if !name.starts_with("set") => width = Width::High,
            _ if modify(&mut found, part) => {}
            _ => return Err(format!("the modifier .{part} is not known")),
        }
    }
    found.carry_in = matches!(name, "addc" | "subc" | "madc");
    found.opcode = opcode(name, width).ok_or_else(|| format!("the opcode {name} is not known"))?;
    Ok(found)
}

/// Which bits of a product are meant.
#[derive(Clone, Copy)]
enum Width {
    Low,
    High,
    Wide,
}

fn opcode(name: &str, width: Width) -> Option<Opcode> {
    Some(match (name, width) {
        ("mul", Width::Wide) => Opcode::MulWide,
        ("mul", Width::High) => Opcode::MulHigh,
        ("mul", Width::Low) => Opcode::Mul,
        ("mad" | "madc", Width::Wide) => Opcode::MadWide,
        ("mad" | "madc", Width::High) => Opcode::MadHigh,
        ("mad" | "madc", Width::Low) => Opcode::Mad,
        ("mov" | "cvta", _) => Opcode::Mov,
        ("ld" | "ldu", _) => Opcode::Ld,
        ("st", _) => Opcode::St,
        ("add" | "addc", _) => Opcode::Add,
        ("sub" | "subc", _) => Opcode::Sub,
        ("div", _) => Opcode::Div,
        ("rem", _) => Opcode::Rem,
        ("abs", _) => Opcode::Abs,
        ("neg", _) => Opcode::Neg,
        ("min", _) => Opcode::Min,
        ("max", _) => Opcode::Max,
        ("fma", _) => Opcode::Fma,
        ("rcp", _) => Opcode::Rcp,
        ("sqrt", _) => Opcode::Sqrt,
        ("rsqrt", _) => Opcode::Rsqrt,
        ("ex2", _) => Opcode::Ex2,
        ("lg2", _) => Opcode::Lg2,
        ("sin", _) => Opcode::Sin,
        ("cos", _) => Opcode::Cos,
        ("tanh", _) => Opcode::Tanh,
        ("and", _) => Opcode::And,
        ("or", _) => Opcode::Or,
        ("xor", _) => Opcode::Xor,
        ("not", _) => Opcode::Not,
        ("shl", _) => Opcode::Shl,
        ("shr", _) => Opcode::Shr,
        ("setp", _) => Opcode::Setp,
        ("set", _) => Opcode::Set,
        ("selp", _) => Opcode::Selp,
        ("cvt", _) => Opcode::Cvt,
        ("bra", _) => Opcode::Bra,
        ("ret" | "exit", _) => Opcode::Ret,
        ("bar" | "barrier", _) => Opcode::Bar,
        ("shfl", _) => Opcode::Shfl,
        ("atom" | "red", _) => Opcode::Atom,
        ("bfi", _) => Opcode::Bfi,
        ("clz", _) => Opcode::Clz,
        ("popc", _) => Opcode::Popc,
        ("copysign", _) => Opcode::Copysign,
        ("trap", _) => Opcode::Trap,
        ("membar" | "fence", _) => Opcode::Fence,
        // Both are replaced by others when operands are read.
        ("call", _) => Opcode::Assert,
        _ => return None,
    })
}

/// Whether the modifier is known; the instruction then has it.
fn modify(found: &mut Instruction, modifier: &str) -> bool {
    match modifier {
        "rn" => found.rounding = Some(Rounding::Nearest),
        "rz" => found.rounding = Some(Rounding::TowardZero),
        "rm" => found.rounding = Some(Rounding::Down),
        "rp" => found.rounding = Some(Rounding::Up),
        "rni" | "rzi" | "rmi" | "rpi" => {
            found.to_integer = true;
            return modify(found, &modifier[..2]);
        }
        "ftz" => found.flush = true,
        "sat" => found.saturate = true,
        "NaN" => found.keep_nan = true,
        "approx" | "full" => found.approximate = true,
        "cc" => found.carry_out = true,
        "global" | "const" => found.space = Space::Global,
        "shared" | "shared::cta" => found.space = Space::Shared,
        "local" => found.space = Space::Local,
        "param" => found.space = Space::Parameter,
        "bfly" => found.shuffle = Shuffle::Butterfly,
        "down" => found.shuffle = Shuffle::Down,
        "up" => found.shuffle = Shuffle::Up,
        "idx" => found.shuffle = Shuffle::Index,
        _ => match (comparison(modifier), combine(modifier)) {
            (Some(comparison), _) => found.comparison = Some(comparison),
            (_, Some(combine)) => found.combine = Some(combine),
            _ => return changes_nothing(modifier),
        },
    }
    true
}

fn comparison(modifier: &str) -> Option<Comparison> {
    Some(match modifier {
        "eq" => Comparison::Equal,
        "ne" => Comparison::NotEqual,
        "lt" | "lo" => Comparison::Less,
        "le" | "ls" => Comparison::LessOrEqual,
        "gt" | "hi" => Comparison::Greater,
        "ge" | "hs" => Comparison::GreaterOrEqual,
        "equ" => Comparison::EqualOrUnordered,
        "neu" => Comparison::NotEqualOrUnordered,
        "ltu" => Comparison::LessOrUnordered,
        "leu" => Comparison::LessOrEqualOrUnordered,
        "gtu" => Comparison::GreaterOrUnordered,
        "geu" => Comparison::GreaterOrEqualOrUnordered,
        "num" => Comparison::BothNumbers,
        "nan" => Comparison::Unordered,
        _ => return None,
    })
}

fn combine(modifier: &str) -> Option<Combine> {
    Some(match modifier {
        "add" => Combine::Add,
        "cas" => Combine::Cas,
        "exch" => Combine::Exch,
        "min" => Combine::Min,
        "max" => Combine::Max,
        "and" => Combine::And,
        "or" => Combine::Or,
        "xor" => Combine::Xor,
        _ => return None,
    })
}

/// Modifiers of caches, scopes and memory orders, which one thread after another has no use for, and those
/// that name what is meant anyway: operands say how long vectors are.
fn changes_nothing(modifier: &str) -> bool {
    matches!(
        modifier,
        "v2" | "v4"
            | "nc"
            | "volatile"
            | "relaxed"
            | "acquire"
            | "release"
            | "acq_rel"
            | "gpu"
            | "cta"
            | "sys"
            | "to"
            | "noftz"
            | "uni"
            | "sync"
            | "ca"
            | "cg"
            | "cs"
            | "wt"
            | "aligned"
            | "L1::no_allocate"
    )
}
