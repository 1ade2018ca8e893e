package iscsi

import (
	"context"

	"firn.io/firn/internal/block"
)

// Fixed are targets that never change, by their names, open to all that Account
// lets in; without one, to everybody. Close of a target is called for each
// session that entered it.
type Fixed struct {
	Targets []Target
	Account Access
}

// List implements Targets.
func (f *Fixed) List(context.Context, Initiator) ([]string, error) {
	names := make([]string, len(f.Targets))
	for i, t := range f.Targets {
		names[i] = t.Name
	}
	return names, nil
}

func (f *Fixed) find(name string) (*Target, error) {
	for i := range f.Targets {
		if f.Targets[i].Name == name {
			t := f.Targets[i]
			if t.Close == nil {
				t.Close = func() {}
			}
			return &t, nil
		}
	}
	return nil, block.Errorf(block.NotFound, "there is no target %q", name)
}

// Access implements Targets.
func (f *Fixed) Access(_ context.Context, target string, _ Initiator) (Access, error) {
	if target == "" {
		return Access{}, nil
	}
	_, err := f.find(target)
	return f.Account, err
}

// Open implements Targets.
func (f *Fixed) Open(_ context.Context, target string, _ Initiator) (*Target, error) {
	return f.find(target)
}
