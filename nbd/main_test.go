package nbd_test

import (
	"bytes"
	"context"
	"fmt"
	"net/http"
	_ "net/http/pprof"
	"os"
	"strconv"
	"testing"

	"firn.io/firn/internal/block/blocktest"
	"firn.io/firn/nbd"
	"firn.io/firn/nbd/device"
)

// TestMain makes the test binary a server of a memory device when
// FIRN_NBD_TEST_SERVER names the address: benchmarks want the server's CPU time
// apart from the client's.
func TestMain(m *testing.M) {
	addr := os.Getenv("FIRN_NBD_TEST_SERVER")
	if addr == "" {
		os.Exit(m.Run())
	}
	dev := blocktest.New(blocktest.Options{Bytes: 1 << 30, Name: "vol", NoLending: os.Getenv("FIRN_NBD_TEST_NO_LENDING") != ""})
	if step := os.Getenv("FIRN_NBD_TEST_STEP"); step != "" {
		if err := fill(dev, step); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	l, err := nbd.Listen(context.Background(), addr)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	if pprof := os.Getenv("FIRN_NBD_TEST_PPROF"); pprof != "" {
		go http.ListenAndServe(pprof, nil)
	}
	fmt.Println(nbd.URI(l.Addr(), "vol"))
	fmt.Fprintln(os.Stderr, nbd.NewServer(nbd.Fixed{*device.Export(dev, nil)}, nbd.Options{}).Serve(l))
	os.Exit(1)
}

// fill writes a block at each multiple of step below 64 MiB.
func fill(dev *blocktest.Device, step string) error {
	n, err := strconv.ParseInt(step, 10, 64)
	for off := int64(0); off < 64<<20 && err == nil; off += n {
		err = dev.WriteAt(context.Background(), bytes.Repeat([]byte{1}, 4096), off, 0)
	}
	return err
}

// shortDir is a temporary directory whose path fits a socket's name.
func shortDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "nbd")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}
