package nbd

import (
	"context"
	"fmt"
	"io/fs"
)

// Fixed are exports that never change; the first is also the default one. Each
// must have a Backend, and Info.Name; Info.Bytes is taken from the Backend.
// Close is called for each connection that entered it.
type Fixed []Export

func (f Fixed) find(name string) (*Export, error) {
	for i := range f {
		if f[i].Info.Name == name || name == "" {
			e := f[i]
			size, err := e.Backend.Size()
			if err != nil {
				return nil, fmt.Errorf("size of export %q: %w", e.Info.Name, err)
			}
			e.Info.Bytes = size
			return &e, nil
		}
	}
	return nil, fmt.Errorf("export %q: %w", name, fs.ErrNotExist)
}

// List implements Exports.
func (f Fixed) List(context.Context) ([]Info, error) {
	infos := make([]Info, len(f))
	for i := range f {
		infos[i] = f[i].Info
	}
	return infos, nil
}

// Info implements Exports.
func (f Fixed) Info(_ context.Context, name string) (Info, error) {
	e, err := f.find(name)
	if err != nil {
		return Info{}, err
	}
	return e.Info, nil
}

// Open implements Exports.
func (f Fixed) Open(_ context.Context, name string) (*Export, error) { return f.find(name) }
