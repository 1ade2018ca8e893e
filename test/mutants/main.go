// Command mutants proves that the proof can fail: each patch beside this file
// breaks one promise of the storage, in a copy of the source, and the test that
// the patch names must then fail, on the checker that it names. A patch that does
// not apply, a copy that does not build, a test that passes or that fails on
// something else: each of them fails the run.
//
//	go run ./test/mutants           all of them
//	go run ./test/mutants NAME...   some
//
// The first lines of a patch say what it breaks:
//
//	Breaks:  what no longer holds
//	Package: the package of the test
//	Test:    its name
//	Checker: what its output must say, a regular expression
package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"
)

// least is how many mutants there are: a patch that got lost fails the run.
const least = 6

const testLimit = "10m"

// mutant is one patch.
type mutant struct {
	name, patch                string
	breaks, pkg, test, checker string
}

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "mutants:", err)
		os.Exit(1)
	}
}

func run(only []string) error {
	root, err := output("", "git", "rev-parse", "--show-toplevel")
	if err != nil {
		return err
	}
	root = strings.TrimSpace(root)
	mutants, err := load(filepath.Join(root, "test", "mutants"))
	if err != nil {
		return err
	}
	if len(mutants) < least {
		return fmt.Errorf("there are %d mutants, there must be %d", len(mutants), least)
	}
	failed, ran := 0, 0
	for _, m := range mutants {
		if len(only) > 0 && !slices.Contains(only, m.name) {
			continue
		}
		ran++
		begin := time.Now()
		if err := m.kill(root); err != nil {
			failed++
			fmt.Printf("FAIL %s (%s): %v\n", m.name, m.breaks, err)
			continue
		}
		fmt.Printf("ok   %-28s found by %s in %.0f s\n", m.name, m.test, time.Since(begin).Seconds())
	}
	if ran == 0 || failed > 0 {
		return fmt.Errorf("%d of %d mutants were not found as they should", failed, ran)
	}
	return nil
}

// load reads the patches in a folder.
func load(dir string) ([]mutant, error) {
	names, err := filepath.Glob(filepath.Join(dir, "*.patch"))
	if err != nil {
		return nil, err
	}
	var out []mutant
	for _, name := range names {
		text, err := os.ReadFile(name)
		if err != nil {
			return nil, err
		}
		m := mutant{name: strings.TrimSuffix(filepath.Base(name), ".patch"), patch: name}
		head, _, _ := strings.Cut(string(text), "\n---")
		for line := range strings.Lines(head) {
			key, value, _ := strings.Cut(line, ":")
			field := map[string]*string{"Breaks": &m.breaks, "Package": &m.pkg, "Test": &m.test, "Checker": &m.checker}[key]
			if field != nil {
				*field = strings.TrimSpace(value)
			}
		}
		if m.breaks == "" || m.pkg == "" || m.test == "" || m.checker == "" {
			return nil, fmt.Errorf("%s does not say what it breaks, and which checker finds it", name)
		}
		out = append(out, m)
	}
	return out, nil
}

// kill applies the patch to a copy of what is committed and runs its test.
func (m mutant) kill(root string) error {
	checker, err := regexp.Compile(m.checker)
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "firn-mutant-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if _, err := output(root, "git", "worktree", "add", "--detach", dir, "HEAD"); err != nil {
		return err
	}
	defer output(root, "git", "worktree", "remove", "--force", dir)
	if out, err := output(dir, "git", "apply", "--whitespace=nowarn", m.patch); err != nil {
		return fmt.Errorf("the patch does not apply: %w\n%s", err, out)
	}
	if out, err := output(dir, "go", "vet", m.pkg); err != nil {
		return fmt.Errorf("it does not build: %w\n%s", err, out)
	}
	out, err := output(dir, "go", "test", "-count=1", "-timeout", testLimit, "-run", "^"+m.test+"$", m.pkg)
	switch {
	case err == nil:
		return fmt.Errorf("%s passes\n%s", m.test, out)
	case !strings.Contains(out, "--- FAIL: "+m.test):
		return fmt.Errorf("%s did not run to its verdict\n%s", m.test, tail(out))
	case !checker.MatchString(out):
		return fmt.Errorf("%s fails, and not on the checker %q\n%s", m.test, m.checker, tail(out))
	}
	return nil
}

// output runs a program and returns what it printed.
func output(dir, name string, args ...string) (string, error) {
	cmd := exec.Command(name, args...)
	cmd.Dir = dir
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		err = fmt.Errorf("%s %s: %w", name, strings.Join(args, " "), err)
	}
	return out.String(), err
}

func tail(out string) string {
	lines := strings.Split(strings.TrimSpace(out), "\n")
	return strings.Join(lines[max(0, len(lines)-20):], "\n")
}
