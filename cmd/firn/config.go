package main

import (
	"fmt"
	"os"
	"sort"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"gopkg.in/yaml.v3"

	"firn.io/firn/internal/block"
)

// onlyFlag marks a flag that must be given on the command line each time: what
// confirms a loss must not lie around in an environment.
const onlyFlag = "firn_only_flag"

func markOnlyFlag(cmd *cobra.Command, names ...string) {
	for _, name := range names {
		f := cmd.Flags().Lookup(name)
		f.Annotations = map[string][]string{onlyFlag: {"true"}}
	}
}

func environmentName(flag string) string {
	return "FIRN_" + strings.ToUpper(strings.ReplaceAll(flag, "-", "_"))
}

// configure fills the flags that the command line left out: from the
// environment (FIRN_NBD for --nbd), then from the file of --config, whose keys
// are the flags' names. One file may serve several commands: a key must be a
// flag of some command.
func configure(cmd *cobra.Command, lookup func(string) (string, bool)) error {
	file := map[string]any{}
	path, _ := cmd.Flags().GetString("config")
	if path == "" {
		path, _ = lookup("FIRN_CONFIG")
	}
	if path != "" {
		text, err := os.ReadFile(path)
		if err != nil {
			return block.Wrap(block.Invalid, err, "read the configuration")
		}
		var shape yaml.Node
		if err := yaml.Unmarshal(text, &shape); err != nil {
			return block.Wrap(block.Invalid, err, "configuration %s", path)
		}
		if err := shape.Decode(&file); err != nil && !shape.IsZero() {
			return block.Errorf(block.Invalid, "configuration %s: it is no map of flag names, such as `nbd: 127.0.0.1:10809`, one a line", path)
		}
		known := map[string]bool{}
		collectFlags(cmd.Root(), known)
		var unknown []string
		for key := range file {
			if !known[key] {
				unknown = append(unknown, key)
			}
		}
		if len(unknown) > 0 {
			sort.Strings(unknown)
			return block.Errorf(block.Invalid, "configuration %s: unknown key %s; keys are the names of flags", path, strings.Join(unknown, ", "))
		}
	}
	var failed error
	cmd.Flags().VisitAll(func(f *pflag.Flag) {
		if failed != nil || f.Changed || f.Annotations[onlyFlag] != nil || f.Name == "config" || f.Name == "help" {
			return
		}
		if text, ok := lookup(environmentName(f.Name)); ok {
			failed = setFlag(cmd, f, strings.Split(text, ","), "environment "+environmentName(f.Name))
			return
		}
		if v, ok := file[f.Name]; ok {
			values, err := configValues(v)
			if err != nil {
				failed = block.Wrap(block.Invalid, err, "configuration %s: %s", path, f.Name)
				return
			}
			failed = setFlag(cmd, f, values, fmt.Sprintf("configuration %s: %s", path, f.Name))
		}
	})
	return failed
}

func collectFlags(cmd *cobra.Command, into map[string]bool) {
	add := func(f *pflag.Flag) {
		if f.Annotations[onlyFlag] == nil {
			into[f.Name] = true
		}
	}
	cmd.Flags().VisitAll(add)
	cmd.PersistentFlags().VisitAll(add)
	for _, sub := range cmd.Commands() {
		collectFlags(sub, into)
	}
}

func configValues(v any) ([]string, error) {
	switch v := v.(type) {
	case []any:
		var out []string
		for _, e := range v {
			s, err := configValues(e)
			if err != nil || len(s) != 1 {
				return nil, fmt.Errorf("a list may hold plain values only")
			}
			out = append(out, s[0])
		}
		return out, nil
	case map[string]any, nil:
		return nil, fmt.Errorf("neither a plain value nor a list")
	default:
		return []string{fmt.Sprint(v)}, nil
	}
}

func setFlag(cmd *cobra.Command, f *pflag.Flag, values []string, from string) error {
	if list, ok := f.Value.(pflag.SliceValue); ok {
		f.Changed = true
		if err := list.Replace(values); err != nil {
			return block.Wrap(block.Invalid, err, "%s", from)
		}
		return nil
	}
	if err := cmd.Flags().Set(f.Name, strings.Join(values, ",")); err != nil {
		return block.Errorf(block.Invalid, "%s: %s", from, human(err))
	}
	return nil
}
