package iscsi_test

import (
	"testing"

	"firn.io/firn/internal/block"
	"firn.io/firn/internal/block/blocktest"
	"firn.io/firn/iscsi"
	"firn.io/firn/iscsi/iscsitest"
)

// TestDevice runs the suite of block.Device through the protocol.
func TestDevice(t *testing.T) {
	t.Parallel()
	blocktest.Run(t, func(t testing.TB, bytes int64) block.Device {
		addr, _ := serve(t, device(bytes, 512), iscsi.Access{})
		c, err := iscsitest.Dial(t.Context(), addr, "iqn.test:a", targetName)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		d, err := iscsitest.NewDevice(t.Context(), c)
		if err != nil {
			t.Fatal(err)
		}
		return d
	})
}
