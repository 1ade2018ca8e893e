package main

import (
	"context"

	"firn.io/firn/gateway"
	"firn.io/firn/internal/block"
	"firn.io/firn/nbd"
	"firn.io/firn/nbd/device"
)

// exports shows every volume as an NBD export of its name. A volume is attached
// when its first client enters it.
type exports struct {
	gateway *gateway.Gateway
	times   *latencies
}

// List implements nbd.Exports.
func (e exports) List(ctx context.Context) ([]nbd.Info, error) {
	all, err := e.gateway.List(ctx)
	if err != nil {
		return nil, err
	}
	infos := make([]nbd.Info, 0, len(all))
	for _, g := range all {
		infos = append(infos, device.Info(g))
	}
	return infos, nil
}

// Info implements nbd.Exports.
func (e exports) Info(ctx context.Context, name string) (nbd.Info, error) {
	name, err := e.resolve(ctx, name)
	if err != nil {
		return nbd.Info{}, err
	}
	g, err := e.gateway.Find(ctx, name)
	if err != nil {
		return nbd.Info{}, err
	}
	return device.Info(g), nil
}

// Open implements nbd.Exports.
func (e exports) Open(ctx context.Context, name string) (*nbd.Export, error) {
	name, err := e.resolve(ctx, name)
	if err != nil {
		return nil, err
	}
	h, err := e.gateway.Open(ctx, name)
	if err != nil {
		return nil, err
	}
	return device.Export(timed{h, e.times}, h.Release), nil
}

// resolve gives the default export "" a meaning where only one is possible.
func (e exports) resolve(ctx context.Context, name string) (string, error) {
	if name != "" {
		return name, nil
	}
	all, err := e.gateway.List(ctx)
	if err != nil {
		return "", err
	}
	if len(all) != 1 {
		return "", block.Errorf(block.NotFound, "there are %d volumes; name one of them as the export", len(all))
	}
	return all[0].Name, nil
}
