use super::*;

#[test]
fn plain_scalars_mean_what_yaml_1_2_says() {
    for (text, scalar) in [
        ("", Scalar::Null),
        ("~", Scalar::Null),
        ("null", Scalar::Null),
        ("nUll", Scalar::Text),
        ("true", Scalar::Boolean),
        ("no", Scalar::Text),
        ("on", Scalar::Text),
        ("y", Scalar::Text),
        ("0", Scalar::Integer),
        ("-12", Scalar::Integer),
        ("0022", Scalar::Integer),
        ("0o17", Scalar::Integer),
        ("0o18", Scalar::Text),
        ("0xFF", Scalar::Integer),
        ("1_000", Scalar::Text),
        ("1.5", Scalar::Float),
        (".5", Scalar::Float),
        ("1.", Scalar::Float),
        ("1e3", Scalar::Float),
        ("-.inf", Scalar::Float),
        (".nan", Scalar::Float),
        (".", Scalar::Text),
        ("-", Scalar::Text),
        ("1e", Scalar::Text),
        ("1.2.3", Scalar::Text),
        ("127.0.0.1:80", Scalar::Text),
        ("12:30", Scalar::Text),
    ] {
        assert_eq!(resolve(text), scalar, "{text:?}");
    }
}
