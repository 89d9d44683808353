//! What instructions are made of. Names of types are those of the PTX manual.

/// A type of PTX.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Type {
    Pred,
    B8,
    B16,
    B32,
    B64,
    U8,
    U16,
    U32,
    U64,
    S8,
    S16,
    S32,
    S64,
    F16,
    BF16,
    F32,
    F64,
    F16x2,
    BF16x2,
}

impl Type {
    /// The type of this name, which is written without its dot.
    pub fn named(name: &str) -> Option<Self> {
        Some(match name {
            "pred" => Self::Pred,
            "b8" => Self::B8,
            "b16" => Self::B16,
            "b32" => Self::B32,
            "b64" => Self::B64,
            "u8" => Self::U8,
            "u16" => Self::U16,
            "u32" => Self::U32,
            "u64" => Self::U64,
            "s8" => Self::S8,
            "s16" => Self::S16,
            "s32" => Self::S32,
            "s64" => Self::S64,
            "f16" => Self::F16,
            "bf16" => Self::BF16,
            "f32" => Self::F32,
            "f64" => Self::F64,
            "f16x2" => Self::F16x2,
            "bf16x2" => Self::BF16x2,
            _ => return None,
        })
    }

    /// Bytes of a value in memory.
    pub fn bytes(self) -> usize {
        match self {
            Self::Pred | Self::B8 | Self::U8 | Self::S8 => 1,
            Self::B16 | Self::U16 | Self::S16 | Self::F16 | Self::BF16 => 2,
            Self::B32 | Self::U32 | Self::S32 | Self::F32 | Self::F16x2 | Self::BF16x2 => 4,
            Self::B64 | Self::U64 | Self::S64 | Self::F64 => 8,
        }
    }

    /// Whether it is an integer with a sign.
    pub fn is_signed(self) -> bool {
        matches!(self, Self::S8 | Self::S16 | Self::S32 | Self::S64)
    }

    /// Whether it is one floating-point number.
    pub fn is_float(self) -> bool {
        matches!(self, Self::F16 | Self::BF16 | Self::F32 | Self::F64)
    }
}

/// Where an address points.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Space {
    /// Global memory, constants, and addresses of no stated kind, which the interpreter takes for global
    /// ones.
    Global,
    /// The memory that a block's threads share.
    Shared,
    /// A thread's own memory.
    Local,
    /// The kernel's parameters.
    Parameter,
}

/// How two values are compared. Those that end in `OrUnordered` also hold where one is not a number.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Comparison {
    Equal,
    NotEqual,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
    EqualOrUnordered,
    NotEqualOrUnordered,
    LessOrUnordered,
    LessOrEqualOrUnordered,
    GreaterOrUnordered,
    GreaterOrEqualOrUnordered,
    BothNumbers,
    Unordered,
}

/// How a result that lies between two numbers is rounded.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Rounding {
    Nearest,
    TowardZero,
    Down,
    Up,
}

/// What an instruction does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Opcode {
    Mov,
    Pack,
    Unpack,
    Ld,
    St,
    Add,
    Sub,
    Mul,
    MulWide,
    MulHigh,
    Mad,
    MadWide,
    MadHigh,
    Div,
    Rem,
    Abs,
    Neg,
    Min,
    Max,
    Fma,
    Rcp,
    Sqrt,
    Rsqrt,
    Ex2,
    Lg2,
    Sin,
    Cos,
    Tanh,
    And,
    Or,
    Xor,
    Not,
    Shl,
    Shr,
    Setp,
    Set,
    Selp,
    Cvt,
    Bra,
    Ret,
    Bar,
    Shfl,
    Atom,
    Bfi,
    Clz,
    Popc,
    Copysign,
    Assert,
    Fence,
    Trap,
}

/// What an atomic instruction does to memory, and how `setp` combines its result with another predicate.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Combine {
    Add,
    Cas,
    Exch,
    Min,
    Max,
    And,
    Or,
    Xor,
}

/// From which lane `shfl` reads.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Shuffle {
    Butterfly,
    Down,
    Up,
    Index,
}

/// Values that a thread knows of itself.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Special {
    /// Number of the thread in its block, along an axis.
    Thread(usize),
    /// Threads of a block, along an axis.
    BlockSize(usize),
    /// Number of the block in its grid, along an axis.
    Block(usize),
    /// Blocks of the grid, along an axis.
    GridSize(usize),
    /// Number of the thread in its warp.
    Lane,
    /// Number of the warp in its block.
    Warp,
    /// A bit for each lane before this one.
    LanesBefore,
    /// Where the shared memory begins whose size the launch chose.
    DynamicShared,
}

/// A register.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Register {
    /// A number a lane, in 64 bits whatever its type.
    Row(u32),
    /// A bit a lane.
    Predicate(u32),
    /// Where results go that nobody reads.
    Nowhere,
}

/// What an instruction reads.
#[derive(Clone, Copy, Debug)]
pub enum Operand {
    /// A register.
    Register(Register),
    /// The same bits for all lanes.
    Value(u64),
    /// What a thread knows of itself.
    Special(Special),
    /// The address of a variable of the module, by its number there.
    Variable(u32),
}

/// The condition on which a lane takes part in an instruction.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Guard {
    /// Number of the predicate.
    pub predicate: u32,
    /// Whether lanes take part whose predicate is false, and not those whose is true.
    pub negated: bool,
}

/// An instruction whose operands are resolved.
#[derive(Clone, Debug)]
pub struct Instruction {
    /// What it does.
    pub opcode: Opcode,
    /// The type that it computes in; of a conversion, the type of the result.
    pub kind: Type,
    /// The second type that it names: of a conversion, what it converts from.
    pub source_kind: Type,
    /// How values are compared.
    pub comparison: Option<Comparison>,
    /// How results are rounded, where the instruction says so.
    pub rounding: Option<Rounding>,
    /// Whether results are whole numbers (`rni`, `rzi`, `rmi`, `rpi`).
    pub to_integer: bool,
    /// Whether subnormal numbers are zero.
    pub flush: bool,
    /// Whether results are held within the range of the type, of floats within 0 and 1.
    pub saturate: bool,
    /// Whether a minimum or maximum with NaN is NaN.
    pub keep_nan: bool,
    /// Whether results may be inexact.
    pub approximate: bool,
    /// Whether it adds the carry.
    pub carry_in: bool,
    /// Whether it leaves a carry.
    pub carry_out: bool,
    /// Where its address points.
    pub space: Space,
    /// Of an atomic instruction, and of `setp` with a third operand.
    pub combine: Option<Combine>,
    /// From which lane a shuffle reads.
    pub shuffle: Shuffle,
    /// Registers that it writes.
    pub results: Vec<Register>,
    /// What it reads.
    pub sources: Vec<Operand>,
    /// A bit for each source that is a negated predicate.
    pub negated: u8,
    /// The lanes that take part.
    pub guard: Option<Guard>,
    /// Bytes between the address operand and what is meant.
    pub offset: i64,
    /// Of a branch: number of the instruction that is next.
    pub target: u32,
    /// Its line in the text.
    pub line: u32,
}

impl Instruction {
    /// An instruction without operands or modifiers.
    pub fn new(opcode: Opcode, line: u32) -> Self {
        Self {
            opcode,
            kind: Type::B32,
            source_kind: Type::B32,
            comparison: None,
            rounding: None,
            to_integer: false,
            flush: false,
            saturate: false,
            keep_nan: false,
            approximate: false,
            carry_in: false,
            carry_out: false,
            space: Space::Global,
            combine: None,
            shuffle: Shuffle::Butterfly,
            results: vec![],
            sources: vec![],
            negated: 0,
            guard: None,
            offset: 0,
            target: 0,
            line,
        }
    }
}
