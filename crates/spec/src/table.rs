//! The shape of the stack file as data.
//!
//! One set of tables (in [`crate::tables`]) is read by three: the decoder takes known keys and defaults from it, the
//! JSON Schema is made of it, and so are the tables of the reference. What is not in a table does not exist.

/// A mapping with fixed keys.
#[derive(Debug)]
pub(crate) struct Table {
    /// Name in the JSON Schema and heading in the reference.
    pub(crate) id: &'static str,
    /// How a message calls it, with an article.
    pub(crate) noun: &'static str,
    /// What it is, for the reference and editors.
    pub(crate) doc: &'static str,
    /// Its keys, in groups that tables share.
    pub(crate) keys: &'static [&'static [Key]],
    /// Words that people try here, with what to write instead.
    pub(crate) habits: &'static [(&'static str, &'static str)],
    /// Keys that exist in the design but not in this version.
    pub(crate) later: &'static [&'static str],
    /// Exactly one of these keys must be there.
    pub(crate) one_of: &'static [&'static str],
}

/// A key of a [`Table`].
#[derive(Debug)]
pub(crate) struct Key {
    pub(crate) name: &'static str,
    pub(crate) shape: Shape,
    pub(crate) required: bool,
    /// What holds without the key, in the notation of the file if it is a value.
    pub(crate) default: &'static str,
    /// Where the default comes from, if not from us.
    pub(crate) origin: &'static str,
    pub(crate) doc: &'static str,
}

/// What a value may be.
#[derive(Debug)]
pub(crate) enum Shape {
    /// Any text; other scalars are taken as the text that stands there.
    Text,
    /// A text in which `{{ … }}` is replaced.
    Template,
    /// A duration.
    Duration,
    /// A size in bytes.
    Size,
    /// A size in bytes, or `unlimited`.
    SizeLimit,
    /// An amount of CPU.
    Cpu,
    /// A count or a share.
    Amount,
    /// A share.
    Percentage,
    /// A share in whole percent that may be above 100.
    Utilization,
    /// A number that is not negative.
    Measure,
    /// An integer from..=to.
    Integer(u64, u64),
    /// An integer from..=to, or `unlimited`.
    CountLimit(u64, u64),
    /// A file mode creation mask in octal.
    Umask,
    /// A name.
    Name,
    /// Any resource's name or a port's name.
    Reference,
    /// One of these words.
    Choice(&'static [&'static str]),
    /// Just `true`.
    True,
    /// The number 1.
    VersionOne,
    /// `127.0.0.1:8080`.
    Address,
    /// `127.0.0.1`.
    Host,
    /// `10.0.0.0/8`, or an address.
    Network,
    /// A mapping with fixed keys.
    Table(&'static Table),
    /// A mapping whose keys are names.
    Names(&'static Shape),
    /// A mapping whose keys are names of flags or variants.
    Keys(&'static Shape),
    /// The name of a variant, or `true` or `false` for `on` or `off`.
    Variant,
    /// The value of a variant: anything but a list.
    FlagValue,
    /// A text, number or boolean.
    Constant,
    /// A number.
    Number,
    /// `true` or `false`.
    Boolean,
    /// A share in percent, exact to a tenth, with or without the sign.
    Weight,
    /// A share, or `rest`.
    Share,
    /// A test of an attribute in any of its forms.
    Test,
    /// Attributes with their tests, or `all`, `any` or `not`.
    Condition,
    /// A mapping with other keys.
    Map(&'static Shape),
    /// A list that may be empty.
    Items(&'static Shape),
    /// A list.
    List(&'static Shape),
    /// One of several shapes.
    Any(&'static [Shape]),
    /// The shape with nothing required and everything deletable.
    Overlay(&'static Shape),
    /// The shape, or nothing.
    Maybe(&'static Shape),
}

impl Key {
    pub(crate) const fn new(name: &'static str, shape: Shape, doc: &'static str) -> Self {
        Self { name, shape, required: false, default: "", origin: "", doc }
    }

    pub(crate) const fn required(mut self) -> Self {
        self.required = true;
        self
    }

    pub(crate) const fn default(mut self, default: &'static str) -> Self {
        self.default = default;
        self
    }

    pub(crate) const fn from(mut self, origin: &'static str) -> Self {
        self.origin = origin;
        self
    }
}

impl Table {
    pub(crate) fn all_keys(&self) -> impl Iterator<Item = &'static Key> + use<> {
        self.keys.iter().flat_map(|group| group.iter())
    }

    pub(crate) fn key(&self, name: &str) -> Option<&'static Key> {
        self.all_keys().find(|key| key.name == name)
    }
}
