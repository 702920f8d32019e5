# What the recipes share; each of them reads this file with `source`.

# A recipe takes its settings as environment variables. Given an argument, it shows its header only.
[ $# = 0 ] || {
    sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p;}' "$0" >&2
    exit 2
}

# attended COMMAND...: run a command and await its end. A stop (Ctrl-C, SIGTERM, a closed terminal)
# lets the command save, and then ends the recipe with status 130, 143 or 129.
attended() {
    local pid status=0 stop=0
    set -m                                 # a process group of its own: a terminal's Ctrl-C
    "$@" <&0 &                             # reaches the command through us alone, once
    pid=$!
    set +m
    trap 'stop=130; kill -INT $pid 2>/dev/null || true' INT
    trap 'stop=143; kill -TERM $pid 2>/dev/null || true' TERM
    trap 'stop=129; kill -TERM $pid 2>/dev/null || true' HUP
    while kill -0 $pid 2>/dev/null; do
        wait $pid && status=0 || status=$? # a signal ends this wait early
    done
    trap - INT TERM HUP
    [ $stop = 0 ] || exit $stop
    return $status
}

# check_model: if MODEL is set, it must be a model folder.
check_model() {
    [ -z "${MODEL:-}" ] || [ -f "$MODEL/config.json" ] || {
        echo "MODEL=$MODEL: no such model folder (it would have a config.json)" >&2
        exit 2
    }
}

# check_data: if DATA is set, it must be a folder.
check_data() {
    [ -z "${DATA:-}" ] || [ -d "$DATA" ] || {
        echo "DATA=$DATA: no such folder; without DATA a synthetic city is made" >&2
        exit 2
    }
}

# check_unused NAME...: this recipe reads none of these settings, so none may be given. Where it
# reads the plural, such as SEEDS for SEED, that is said.
check_unused() {
    for setting in "$@"; do
        [ -n "${!setting:-}" ] || continue
        echo -n "$setting=${!setting}: has no effect here" >&2
        ! grep -q "^#   ${setting}S=" "recipes/$(basename "$0")" ||
            echo -n "; ${setting}S=\"${!setting}\" has" >&2
        echo >&2
        exit 2
    done
}

# check_jobs: JOBS must be a whole number, at least 1.
check_jobs() {
    [[ $JOBS =~ ^[1-9][0-9]*$ ]] || {
        echo "JOBS=$JOBS: expected a whole number from 1" >&2
        exit 2
    }
}

# check_numbers NAME...: each of these settings must be a list of whole numbers.
check_numbers() {
    for setting in "$@"; do
        [[ ${!setting} =~ ^[0-9]+( +[0-9]+)*$ ]] || {
            echo "$setting=${!setting}: expected whole numbers, such as $setting=0" >&2
            exit 2
        }
    done
}

# same_settings FILE SETTINGS: keep the settings in the file, or end the recipe if it was begun with
# others.
same_settings() {
    [ -f "$1" ] || { echo "$2" >"$1.new" && mv "$1.new" "$1"; }
    [ "$(cat "$1")" = "$2" ] || {
        echo "$1 says that this was begun with $(cat "$1"), not with $2: choose another OUT" >&2
        exit 2
    }
}
