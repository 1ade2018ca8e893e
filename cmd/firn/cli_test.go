package main

import (
	"bytes"
	"context"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"pgregory.net/rapid"

	"firn.io/firn/internal/block"
)

func TestParseSize(t *testing.T) {
	for text, want := range map[string]int64{
		"4096": 4096, "1K": 1 << 10, "512M": 512 << 20, "10G": 10 << 30, "10g": 10 << 30, "10GiB": 10 << 30, "10GB": 10 << 30,
		"1.5T": 3 << 39, "0": 0, "8P": 8 << 50, "0.5K": 512, " 2M ": 2 << 20, "7B": 7,
	} {
		if got, err := parseSize(text); err != nil || got != want {
			t.Errorf("%q is %d, %v; want %d", text, got, err, want)
		}
	}
	for _, text := range []string{"", "G", "-1", "1.G", "0.3", "1X", "9999999P", "1e9", "0x10", "9223372036854775808", "1 2", ".", "1.2345678901234567K", "8192P"} {
		if got, err := parseSize(text); err == nil || block.KindOf(err) != block.Invalid {
			t.Errorf("%q is %d, %v; want an error of kind invalid", text, got, err)
		}
	}
}

func TestFormatSizeReadsBack(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		shift := rapid.IntRange(0, 50).Draw(t, "shift")
		n := int64(rapid.IntRange(1, 1023).Draw(t, "n")) << (shift / 10 * 10)
		if got, err := parseSize(formatSize(n)); err != nil || got != n {
			t.Fatalf("%d is written %q and read as %d, %v", n, formatSize(n), got, err)
		}
	})
	if got := formatSize(3<<29 + 1); got != "1.5G" {
		t.Errorf("%q", got)
	}
}

func TestStatusKeepsKindAndText(t *testing.T) {
	for k := range kindTable {
		back := fromStatus(toStatus(block.Errorf(k, "volume %q: because", "v")), "addr")
		if block.KindOf(back) != k || back.Error() != `volume "v": because` {
			t.Errorf("kind %v came back as %v: %v", k, block.KindOf(back), back)
		}
	}
	seen := map[int]block.Kind{}
	for k := block.Internal; k <= block.Denied; k++ {
		row, ok := kindTable[k]
		if other, twice := seen[row.exit]; !ok || row.exit == 0 || twice {
			t.Errorf("kind %v has exit code %d, also of %v", k, row.exit, other)
		}
		seen[row.exit] = k
	}
}

// probe is a command that records its flags.
func probe(args []string, environment map[string]string) (addr string, list []string, sure bool, err error) {
	c := &console{out: &bytes.Buffer{}, err: &bytes.Buffer{}}
	lookup := func(name string) (string, bool) { v, ok := environment[name]; return v, ok }
	root := newRoot(c, lookup)
	cmd := &cobra.Command{Use: "probe", RunE: func(*cobra.Command, []string) error { return nil }}
	cmd.Flags().StringVar(&addr, "nbd-test", "default", "")
	cmd.Flags().StringArrayVar(&list, "entry", nil, "")
	cmd.Flags().BoolVar(&sure, "yes", false, "")
	markOnlyFlag(cmd, "yes")
	root.AddCommand(cmd)
	root.SetArgs(append([]string{"probe"}, args...))
	return addr, list, sure, root.ExecuteContext(context.Background())
}

func TestFlagsEnvironmentAndFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "firn.yaml")
	if err := os.WriteFile(file, []byte("nbd-test: from-file\nentry: [a, b]\napi: 127.0.0.1:1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	env := map[string]string{"FIRN_NBD_TEST": "from-env", "FIRN_ENTRY": "x,y", "FIRN_YES": "true"}
	cases := []struct {
		args []string
		env  map[string]string
		addr string
		list string
	}{
		{nil, nil, "default", ""},
		{[]string{"--config", file}, nil, "from-file", "a b"},
		{nil, map[string]string{"FIRN_CONFIG": file}, "from-file", "a b"},
		{[]string{"--config", file}, env, "from-env", "x y"},
		{[]string{"--nbd-test", "from-flag", "--entry", "z"}, env, "from-flag", "z"},
	}
	for _, c := range cases {
		addr, list, sure, err := probe(c.args, c.env)
		if err != nil || addr != c.addr || strings.Join(list, " ") != c.list || sure {
			t.Errorf("%v with %v: %q, %v, %v, %v", c.args, c.env, addr, list, sure, err)
		}
	}
}

func TestBadConfiguration(t *testing.T) {
	for text, want := range map[string]string{
		"nbd-tset: x":       "unknown key nbd-tset",
		"yes: true":         "unknown key yes",
		"nbd-test: {a: b}":  "neither a plain value nor a list",
		"json: perhaps":     "perhaps",
		"nbd-test: [":       "yaml",
		"[a, b]":            "no map of flag names",
		"just words":        "no map of flag names",
		"entry: [[1], [2]]": "", // lists of one are plain
	} {
		file := filepath.Join(t.TempDir(), "firn.yaml")
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		_, _, _, err := probe([]string{"--config", file}, nil)
		switch {
		case want == "" && err != nil:
			t.Errorf("%q: %v", text, err)
		case want != "" && (err == nil || !strings.Contains(err.Error(), want) || exitCode(err) != 2):
			t.Errorf("%q: %v; want %q", text, err, want)
		}
	}
	if _, _, _, err := probe([]string{"--config", "/does/not/exist"}, nil); err == nil || exitCode(err) != 2 {
		t.Errorf("%v", err)
	}
}

func TestCommandLineErrors(t *testing.T) {
	for _, c := range []struct {
		args string
		exit int
		text string
	}{
		{"--nonsense", 2, "unknown flag"},
		{"nonsense", 2, "unknown command"},
		{"volume create x", 2, "it takes 2 arguments, 1 was given"},
		{"volume set x", 2, "it takes at least 2 arguments, 1 was given"},
		{"volume create x 1G --replicas 0", 2, "use 1, 3 or 5"},
		{"volume create x 1G --replicas many", 2, "a whole number is needed"},
		{"volume ls --timeout 5", 2, "write it as 30s"},
		{"up --nodes 99999999999999999999", 2, "out of range"},
		{"up --volume a=1G --volume a=2G", 2, "asked for twice"},
		{"up --volume ä=1G", 2, "'ä' is not allowed"},
		{"up --nbd 10809", 2, "HOST:PORT, such as 127.0.0.1:10809"},
		{"up --api nowhere", 2, "HOST:PORT"},
		{"up --http localhost:http2", 2, "is no port"},
		{"node --id 1 --disk d --etcd foo", 2, "--etcd foo: write it as http://HOST:2379"},
		{"node --id 1 --disk d --etcd ftp://a:1", 2, "http://HOST:2379"},
		{"gateway --id g --data d --etcd http://a", 2, "with the port"},
		{"volume nonsense", 2, "unknown command"},
		{"volume create", 2, "usage: firn volume create NAME SIZE"},
		{"volume create x 10Q", 2, "is not a size"},
		{"volume set x colour=red", 2, "no setting"},
		{"volume ls --api 127.0.0.1:1", 6, "no answer from 127.0.0.1:1"},
		{"volume ls --api 192.0.2.1:7400", 2, "--insecure"},
		{"volume ls --tls-cert x", 2, "belong together"},
		{"up --volume demo=0", 2, "--volume demo=0: size 0"},
		{"up --data cli_test.go", 2, "that is a file"},
		{"node --id 1 --disk d=3Q --etcd http://e:1", 2, "--disk d=3Q"},
		{"gateway --id g --data d --etcd", 2, "needs an argument"},
	} {
		var out, errs bytes.Buffer
		con := &console{in: strings.NewReader(""), out: &out, err: &errs}
		got := run(context.Background(), con, func(string) (string, bool) { return "", false }, strings.Fields(c.args))
		if got != c.exit || !strings.Contains(errs.String(), c.text) || out.Len() > 0 {
			t.Errorf("firn %s: exit %d, stderr %q, stdout %q; want %d and %q", c.args, got, errs.String(), out.String(), c.exit, c.text)
		}
	}
}

func TestHelpNamesEveryCommand(t *testing.T) {
	var out bytes.Buffer
	if code := run(context.Background(), &console{out: &out, err: &out}, os.LookupEnv, []string{"--help"}); code != 0 {
		t.Fatal(out.String())
	}
	for _, name := range []string{"up", "node", "gateway", "volume", "attach", "detach", "status", "health"} {
		if !strings.Contains(out.String(), "\n  "+name+" ") {
			t.Errorf("--help does not list %s:\n%s", name, out.String())
		}
	}
}

// TestHelpNamesBothProtocols: whoever looks for iSCSI finds it.
func TestHelpNamesBothProtocols(t *testing.T) {
	for _, args := range [][]string{{"--help"}, {"gateway", "--help"}} {
		var out bytes.Buffer
		run(context.Background(), &console{out: &out, err: &out}, os.LookupEnv, args)
		first, _, _ := strings.Cut(out.String(), "\n\n")
		if !strings.Contains(first, "NBD") || !strings.Contains(first, "iSCSI") {
			t.Errorf("%v begins with\n%s", args, first)
		}
	}
}

func TestOpenErrorNamesItsCause(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	_, inUse := net.Listen("tcp", taken.Addr().String())
	cfg := storageConfig{listen: taken.Addr().String()}
	for _, c := range []struct {
		err  error
		exit int
		text string
	}{
		{block.Wrap(block.Unavailable, inUse, "listen"), 5, "choose another address with --listen"},
		{block.Wrap(block.Unavailable, block.Errorf(block.Invalid, "too small"), "no usable disk"), 2, "too small"},
		{block.Errorf(block.NotFound, "make folder /proc/x"), 2, "/proc/x"},
		{block.Errorf(block.Busy, "folder in use"), 5, "folder in use"},
		{block.Errorf(block.Unavailable, "disk failed"), 6, "disk failed"},
	} {
		got := openError(cfg, c.err)
		if exitCode(got) != c.exit || !strings.Contains(got.Error(), c.text) {
			t.Errorf("%v: exit %d, %v; want %d and %q", c.err, exitCode(got), got, c.exit, c.text)
		}
	}
}

// TestRefusedUpLeavesNothing: what is wrong with the ports is known before a new
// folder is made.
func TestRefusedUpLeavesNothing(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	dir := filepath.Join(t.TempDir(), "new")
	var out, errs bytes.Buffer
	con := &console{in: strings.NewReader(""), out: &out, err: &errs}
	code := run(t.Context(), con, func(string) (string, bool) { return "", false },
		[]string{"up", "--data", dir, "--nbd", taken.Addr().String(), "--api", "127.0.0.1:0", "--http", ""})
	if code != 5 || !strings.Contains(errs.String(), "--nbd") {
		t.Errorf("exit %d, %s", code, errs.String())
	}
	if _, err := os.Stat(dir); !os.IsNotExist(err) {
		t.Errorf("the refused start left %s: %v", dir, err)
	}
}

// TestVersionNamesTheCommit that the linker was told, where the build does not.
func TestVersionNamesTheCommit(t *testing.T) {
	was := revision
	defer func() { revision = was }()
	if revision = "0123456789ab"; version() == "devel" {
		t.Error("the version names no commit")
	}
}

// TestYieldedVolumeIsNamed: by the name that people know.
func TestYieldedVolumeIsNamed(t *testing.T) {
	var y yielded
	id := block.VolumeID{1}
	y.add(id, "demo")
	if err := y.check(id); err == nil || !strings.Contains(err.Error(), `volume "demo" was detached`) {
		t.Errorf("%v", err)
	}
	if err := y.check(block.VolumeID{2}); err != nil {
		t.Errorf("%v", err)
	}
}
